"""`python -m bench step`: all implementations compute the same function; ratios and targets follow from the rounds."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from bench import training_step
from bench.__main__ import main
from bench.moco_steps import IMPLEMENTATIONS, SETTINGS, Setting
from bench.training_step import Options, Row
from fastssl.benchmark.step_variants import as_training, synthetic_batches

CPU = torch.device("cpu")
TINY = Options(batch_size=8, queue_size=32, width=1 / 16, device="cpu")
FP32, BF16 = SETTINGS


def losses(name: str, setting: Setting = FP32, steps: int = 6) -> list[float]:
    config = training_step.configuration(TINY)
    batches = [as_training(batch, setting.dtype, setting.layout) for batch in synthetic_batches(config, CPU)]
    run = IMPLEMENTATIONS[name](config, CPU, setting)
    return [run(batches[index % len(batches)]).item() for index in range(steps)]


def test_the_plain_loop_is_the_same_training() -> None:
    """Losses over more steps than the queue has batches, so gradient, momentum encoder and queue agree too."""
    ours, plain = losses("fastssl"), losses("plain loop")
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert ours == pytest.approx(plain, rel=1e-5)
    assert len({round(loss, 4) for loss in ours}) == len(ours)


def test_lightly_is_the_same_training() -> None:
    pytest.importorskip("lightly.loss")
    ours, theirs = losses("fastssl"), losses("lightly")
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_bf16_is_near_fp32() -> None:
    for name in ("fastssl", "plain loop"):
        assert losses(name, BF16, 1) == pytest.approx(losses(name, FP32, 1), rel=1e-2)
        assert losses(name, BF16, 1) != losses(name, FP32, 1)


def test_a_run_measures_every_implementation_and_notes_a_missing_peer(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    path = tmp_path / "step.json"
    sizes = ["--batch-size", "8", "--queue-size", "32", "--width", "0.0625"]
    arguments = [*sizes, "--steps", "1", "--repeats", "2", "--device", "cpu", "--threads", "1", "--json", str(path)]
    assert main(["step", *arguments]) == 0
    written, table = json.loads(path.read_text()), capsys.readouterr().out
    rows = written["rows"]
    assert [(row["name"], row["setting"]) for row in rows] == [
        (training_step.BEST, "chosen"),
        ("fastssl", "fp32"),
        ("plain loop", "fp32"),
        (training_step.SHIPPED, "fp32"),
        ("fastssl", "bf16"),
        ("plain loop", "bf16"),
        ("lightly", "bf16"),
    ]
    for row in rows:
        missing = "lightly" in row["name"]
        assert len(row["images_per_s"]) == (0 if missing else 2)
        assert len(row["losses"]) == (0 if missing else training_step.FIRST_STEPS)
        assert ('the extra "peers" installs it' in row["note"]) == missing
    assert 'the extra "peers" installs it' in table
    assert rows[0]["slower_than_best"] == [1, 1]
    assert len(written["targets"]) == 2  # The plain loop in both settings
    assert {"versions", "commit", "device", "settings"} <= set(written)


def test_ratios_are_taken_round_by_round() -> None:
    rows = [
        Row(training_step.BEST, "chosen", images_per_s=[80.0, 40.0, 80.0]),
        Row("fastssl", "fp32", images_per_s=[30.0, 15.0, 30.0]),
        Row(training_step.SHIPPED, "fp32", images_per_s=[20.0, 10.0, 15.0]),
        Row("plain loop", "fp32", images_per_s=[31.0, 15.5, 31.0]),
        Row("lightly", "bf16", note="missing"),
    ]
    training_step._compare(rows)
    assert [row.slower_than_best for row in rows[2:]] == [
        [4, 4, 80 / 15],
        pytest.approx([80 / 31, 40 / 15.5, 80 / 31]),
        [],
    ]
    assert [row.slower_than_equal for row in rows[:3]] == [[], [1, 1, 1], [1.5, 1.5, 2]]
    assert training_step.targets(rows) == [
        "4 times the speed of lightly as shipped: met, 4 times (p20 4, p80 4.8)",
        "not slower than lightly as shipped in fp32: met, 1.5 times (p20 1.5, p80 1.8)",
        "not slower than plain loop in fp32: missed, 0.968 times (p20 0.968, p80 0.968)",
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repeats", "0"], "--repeats 0 was given; it must be at least 1"),
        (["--width", "0"], "--width 0.0 was given; it must be above 0"),
        (["--queue-size", "100"], "--queue-size 100 was given with --batch-size 64; it must be a multiple of it"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(arguments, sentence, capsys) -> None:
    assert main(["step", *arguments]) == 2
    assert sentence in capsys.readouterr().err
