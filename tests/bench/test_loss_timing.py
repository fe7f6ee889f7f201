"""The harness computes what it says: errors, memory, times, ratios, reasons; small shapes, no torch.compile."""

from __future__ import annotations

import json
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from bench import loss_timing, measure, peers, run_record
from bench.__main__ import main
from fastssl.benchmark.harness import peak_bytes
from fastssl_kernels import parity

SHAPE = (8, 64, 16)


def case(loss: str = "info_nce") -> peers.Case:
    inputs = parity.make_inputs(*SHAPE).to(torch.float32, torch.float32)
    return peers.Case(loss, inputs, 0.2, torch.bfloat16)


def rows(names: list[str], loss: str = "info_nce") -> dict[str, run_record.Row]:
    columns = {name: peers.COLUMNS[name] for name in ["fastssl", *names]}
    return {row.column: row for row in loss_timing.measure(case(loss), columns, repeats=3)}


def test_a_run_writes_every_column_with_the_circumstances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["fastssl", "fastssl-accuracy", "matmuls", "eager", "eager-autocast", "sdpa-flash", "sdpa-cudnn"]
    arguments = ["losses", "--shapes", "8x64x16", "--device", "cpu", "--repeats", "3", "--out", str(tmp_path)]
    assert main([*arguments, "--loss", "all", "--columns", *names]) == 0
    (path,) = tmp_path.glob("losses-*.json")
    run = json.loads(path.read_text())
    assert {"command", "device", "versions", "commit", "date", "rows"} <= set(run)
    assert run["command"].startswith("python -m bench losses --shapes 8x64x16")
    assert run["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [(row["loss"], row["column"]) for row in run["rows"]] == [
        (loss, name) for loss in ("info_nce", "unicon") for name in names
    ]
    assert all(set(row) == {field.name for field in fields(run_record.Row)} for row in run["rows"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert str(path) in printed


def test_exact_columns_agree_with_the_definition_and_autocast_rounds() -> None:
    found = rows(["eager", "sdpa-flash", "eager-autocast"])
    for name in ("fastssl", "eager", "sdpa-flash"):
        assert found[name].loss_error < 1e-6
        assert found[name].gradient_error < 1e-5
    assert 1e-4 < found["eager-autocast"].gradient_error < 2e-2
    assert rows(["eager"], "unicon")["eager"].gradient_error < 1e-5


def test_errors_are_those_of_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(given: peers.Case) -> measure.Step:
        step = peers.COLUMNS["eager"].build(given)
        return lambda: tuple(factor * x for factor, x in zip((1.02, 0.9), step(), strict=True))

    monkeypatch.setitem(peers.COLUMNS, "wrong", peers.Column(wrong, ""))
    row = rows(["wrong"])["wrong"]
    assert row.loss_error == pytest.approx(0.02, rel=1e-3)
    assert row.gradient_error == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("loss", ["soft_cross_entropy", "bank_cross_entropy", "nt_xent"])
def test_a_registered_loss_without_peers_is_measured_alone(loss: str) -> None:
    found = rows(["eager", "fastssl-accuracy"], loss)
    assert found["fastssl"].loss_error < 1e-6
    assert found["fastssl"].gradient_error < 5e-5
    assert found["eager"].note == f"has no {loss}"


def test_the_truth_in_parts_is_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = loss_timing.exact(case("unicon"))
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda x, size: split(x, 3))
    for part, expected in zip(loss_timing.exact(case("unicon")), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=0)


def test_a_column_that_cannot_run_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: peers.Case) -> measure.Step:
        raise RuntimeError("no kernel\nmore")

    monkeypatch.setitem(peers.COLUMNS, "broken", peers.Column(broken, ""))
    found = rows(["broken", "sdpa-cudnn"])
    assert found["broken"].note == "RuntimeError: no kernel"
    assert found["broken"].median_ms is None
    assert found["broken"].ratio_to_ours is None
    assert found["sdpa-cudnn"].note == "cuDNN attention needs a CUDA device"
    assert rows(["sdpa-flash"], "unicon")["sdpa-flash"].note == "has no unicon"


def test_a_failure_of_fastssl_is_no_footnote(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: peers.Case) -> measure.Step:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(peers.COLUMNS, "fastssl", replace(peers.COLUMNS["fastssl"], build=broken))
    with pytest.raises(RuntimeError, match="no kernel"):
        rows([])


def test_steps_are_timed_in_turn_and_compared_with_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.COLUMNS, "slow", peers.Column(lambda _: lambda: time.sleep(0.02), ""))
    found = rows(["slow"])
    assert 20 <= found["slow"].p20_ms <= found["slow"].median_ms <= found["slow"].p80_ms < 200
    assert found["slow"].ratio_to_ours == pytest.approx(found["slow"].median_ms / found["fastssl"].median_ms)
    assert found["fastssl"].ratio_to_ours == 1
    order: list[str] = []
    measure.time_cpu({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2, warm_ups=1)
    assert order == list("ababab")


def test_spread_is_median_and_quantiles() -> None:
    assert measure.spread(range(101)) == (50, 20, 80)


def test_memory_is_the_peak_and_not_the_sum() -> None:
    def step() -> torch.Tensor:
        for _ in range(3):
            block = torch.ones(2**20)
            del block
        return torch.ones(2**18)

    before = torch.ones(2**22)
    assert peak_bytes(step, torch.device("cpu")) == pytest.approx(2**22, abs=2**12)
    assert peak_bytes(before.sum, torch.device("cpu")) < 2**12


@pytest.mark.parametrize("name", ["lightly", "pml-ntxent", "pml-supcon"])
def test_peers_as_shipped(name: str) -> None:
    pytest.importorskip("lightly" if name == "lightly" else "pytorch_metric_learning")
    given = case()
    queue = given.inputs.queue.clone()
    step = peers.COLUMNS[name].build(given)
    step()
    step()
    assert torch.equal(given.inputs.queue, queue)
    row = rows([name])[name]
    if name == "lightly":
        assert row.gradient_error < 1e-5
    else:  # The batch's other keys are negatives too
        assert 1e-3 < row.loss_error < 0.5


def test_metric_learning_computes_what_its_note_says() -> None:
    pytest.importorskip("pytorch_metric_learning")
    given = case()
    keys, query = given.inputs.key, given.inputs.query
    logits = query @ torch.cat([keys, given.inputs.queue]).T / given.temperature
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(len(query)))
    for name in ("pml-ntxent", "pml-supcon"):
        torch.testing.assert_close(peers.COLUMNS[name].build(given)()[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--columns", "sdpa-flsh"], "did you mean 'sdpa-flash'?"),
        (["--shapes", "8x64"], "N x K x C"),
        (["--shapes", "8x0x16"], "N x K x C"),
        (["--repeats", "1"], "2 or more"),
        (["--device", "tpu"], "auto, cpu or cuda"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["losses", "--shapes", "8x64x16", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("bench: ")
    assert message.count("\n") == 1
    assert sentence in message


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lossses"]) == 2
    assert "did you mean 'losses'?" in capsys.readouterr().err
