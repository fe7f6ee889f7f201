"""`fastssl bench e2e`: it measures input, step and both, and derives the cause of the gap."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

from fastssl.commands import bench_end_to_end as end_to_end
from fastssl.errors import ConfigError
from fastssl.presets import load

CPU = torch.device("cpu")


def tiny():
    """Procedural pictures, and the smallest possible encoder and queue."""
    config = load("mocov2-cifar10")
    return replace(
        config,
        model=replace(config.model, width=1 / 32, splits=2),
        method=replace(config.method, queue_size=32),
        train=replace(config.train, batch_size=8, device="cpu"),
        data=replace(config.data, pictures=48, workers=0),
    )


def test_input_step_and_both_are_measured(tmp_path, capsys):
    path = tmp_path / "e2e.json"
    options = end_to_end.Options(seconds=0.2, repeats=2, threads=1, json=path, profile=tmp_path / "traces")
    assert end_to_end.run(tiny(), options) == 0
    written, table = json.loads(path.read_text()), capsys.readouterr().out
    rates = {result["name"]: result["images_per_s"] for result in written["results"]}
    assert set(rates) == set(end_to_end.NAMES)
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())
    medians = {name: sum(values) / 2 for name, values in rates.items()}
    assert written["ceiling_images_per_s"] == pytest.approx(min(medians["input"], medians["step"]))
    rounds = zip(rates["input"], rates["step"], rates["both"], strict=True)
    assert written["gap"] == pytest.approx(sum(1 - both / min(alone, step) for alone, step, both in rounds) / 2)
    for name in ("step", "both"):
        shares = next(result["shares"] for result in written["results"] if result["name"] == name)
        assert {"data", "forward", "loss", "backward", "optimizer"} == set(shares)
        assert 0.5 < sum(values[0] for values in shares.values()) < 1.01
    assert written["cause"] in table
    (trace,) = (tmp_path / "traces").iterdir()
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_slow_input_is_found_to_be_the_cause(monkeypatch, capsys):
    def slow(*arguments, **options):
        executor = real(*arguments, **options)
        stream = executor.stream

        def sleepy(*steps):
            for batch in stream(*steps):
                time.sleep(0.2)
                yield batch

        executor.stream = sleepy
        return executor

    real = end_to_end.input_executor
    monkeypatch.setattr(end_to_end, "input_executor", slow)
    assert end_to_end.run(tiny(), end_to_end.Options(seconds=0.3, repeats=1, threads=1)) == 0
    assert "data-bound: the step waits" in capsys.readouterr().out


def results(alone, step_alone, both, waiting):
    def shares(data):
        return {"data": [data], "forward": [0.5 * (1 - data)], "backward": [0.4 * (1 - data)]}

    return {
        "input": end_to_end.Result("input", [alone]),
        "step": end_to_end.Result("step", [step_alone], shares(0.0)),
        "both": end_to_end.Result("both", [both], shares(waiting)),
    }


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((1000, 100, 99, 0.0), "step-bound: the input keeps up, and 50% of the time goes to the forward"),
        ((50, 100, 50, 0.5), "data-bound: the step waits 50% of the time for input; raise --data.workers (now 0 for"),
        ((100, 100, 50, 0.0), "contention: a step takes 160.0 ms while the input runs and 80.0 ms alone"),
        (
            (150, 100, 60, 0.4),
            "run in turns they would reach 60 images/s",
        ),  # Fast enough alone, but not while the step runs
    ],
)
def test_the_cause_of_the_gap(given, sentence):
    assert sentence in end_to_end.cause(results(*given), tiny(), "resident", CPU)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seconds": 0.0}, "--seconds 0.0 was given; it must be above 0"),
        ({"repeats": 0}, "--repeats 0 was given; it must be at least 1"),
        ({"threads": -1}, "--threads -1 was given; it must be at least 1"),
    ],
)
def test_bad_options_are_one_sentence(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        end_to_end.Options(**given)
