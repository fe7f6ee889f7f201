from __future__ import annotations

import pytest
import torch

from fastssl.cli import main
from fastssl.commands import verify, verify_augment
from fastssl_kernels import ops, parity
from fastssl_kernels.blockwise import losses as blockwise
from fastssl_kernels.rows import Rows


@pytest.fixture(autouse=True)
def small_on_a_cpu(monkeypatch):
    """Seconds instead of a minute, without the interpreter."""
    monkeypatch.setattr(verify, "CPU_SHAPE", (17, 200, 128))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def lines(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_every_loss_passes_in_float32(capsys):
    assert main(["verify", "--device", "cpu", "--dtype", "float32"]) == 0
    rows = [line for line in lines(capsys) if line[-1] == "pass"]
    assert [row[:3] for row in rows] == [[loss, "float32", "blockwise"] for loss in (*parity.LOSSES, "augment")]
    *losses, augment = rows
    assert all(0 < float(row[3]) <= float(row[7]) and 0 < float(row[4]) <= float(row[8]) for row in losses)
    assert 0 < float(augment[3]) <= float(augment[7])
    assert {row[9] for row in rows} <= {"contiguous", "column-major", "sliced"}


def test_every_dtype_of_one_loss(capsys):
    assert main(["verify", "info_nce", "--device", "cpu"]) == 0
    *rows, last = (line for line in lines(capsys) if "pass" in line[-1])
    assert [row[1] for row in rows] == ["float64", "float32", "bfloat16", "float16"]
    # The column `plain`: the same code with products rounded to 8 bits
    assert float(rows[2][5]) > 100 * float(rows[1][5])
    assert " ".join(last) == "all 4 passed"


def test_a_loss_is_verified_with_its_variants(capsys):
    assert main(["verify", "consistency", "--device", "cpu", "--dtype", "float64"]) == 0
    assert [line[0] for line in lines(capsys) if line[-1] == "pass"] == ["consistency", "consistency+positive"]


def test_a_fault_of_one_layout_is_found_and_named(capsys, monkeypatch):
    right = ops.info_nce

    def wrong(query, *arguments):
        return right(query if query.is_contiguous() else query + 1e-3, *arguments)

    monkeypatch.setattr(ops, "info_nce", wrong)
    assert main(["verify", "info_nce", "--device", "cpu", "--dtype", "float32"]) == 1
    assert [line[-2:] for line in lines(capsys) if line[0] == "info_nce"] == [["column-major", "FAIL"]]


def test_a_fault_of_augment_is_found(capsys, monkeypatch):
    right = verify_augment.augment
    monkeypatch.setattr(verify_augment, "augment", lambda *given, **options: right(*given, **options) + 1e-4)
    assert main(["verify", "augment", "--device", "cpu", "--dtype", "float32"]) == 1
    assert [line[-1] for line in lines(capsys) if line[0] == "augment"] == ["FAIL"]


@pytest.mark.parametrize("fault", ["loss", "gradient", "nan"])
def test_a_fault_is_found(fault, capsys, monkeypatch):
    right = blockwise.info_nce_rows

    def wrong(*arguments):
        rows = right(*arguments)
        if fault == "loss":
            return Rows(rows.loss * (1 + 3e-6), rows.gradient, rows.accuracy)
        return Rows(rows.loss, rows.gradient * (1 + 3e-5 if fault == "gradient" else torch.nan), rows.accuracy)

    monkeypatch.setattr(blockwise, "info_nce_rows", wrong)
    assert main(["verify", "info_nce", "--device", "cpu", "--dtype", "float32"]) == 1
    printed = lines(capsys)
    assert [line[-1] for line in printed if line[0] == "info_nce"] == ["FAIL"]
    assert " ".join(printed[-1]) == "1 of 1 failed"


def test_the_caption_names_device_and_versions(capsys):
    main(["verify", "info_nce", "--device", "cpu", "--dtype", "float64"])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"torch {torch.__version__}" in printed
    assert "triton " in printed
    assert "cpu: " in printed
    assert "17 x 200 x 128" in printed


def test_bad_arguments_are_reported_in_a_sentence(capsys, monkeypatch):
    assert main(["verify", "infonce"]) == 2
    assert "did you mean 'info_nce'?" in capsys.readouterr().err
    assert main(["verify", "--dtype", "float8"]) == 2
    assert "float8" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["verify", "--device", "cuda"]) == 2
    assert "torch finds no CUDA device; use --device cpu" in capsys.readouterr().err
