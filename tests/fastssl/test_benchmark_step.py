"""`fastssl bench step`: it measures the step of a run, and its sentences follow from the results."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastssl.benchmark import step_variants as training
from fastssl.benchmark.harness import write_trace
from fastssl.benchmark.step_variants import CHOSEN, SUPERVISED, Candidate, Passes, Result
from fastssl.commands import bench_step as step
from fastssl.device import choose_dtype
from fastssl.errors import ConfigError, TrainingError
from fastssl.presets import load
from fastssl.train.build import build_method, build_step

CPU = torch.device("cpu")


def tiny(name="mocov2-cifar10", batch_size=8):
    """The preset with the smallest possible encoder and queue."""
    config = load(name)
    method = replace(config.method, queue_size=32) if hasattr(config.method, "queue_size") else config.method
    model = replace(config.model, width=1 / 32, splits=2)
    train = replace(config.train, batch_size=batch_size, device="cpu")
    return replace(config, model=model, method=method, train=train, data=replace(config.data, pictures=48))


@pytest.fixture
def uncompiled(monkeypatch):
    """Replaces torch.compile, which takes minutes on two cores, and records its arguments."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    return compiled


@pytest.mark.slow
def test_all_variants_are_measured_and_written(tmp_path, monkeypatch, uncompiled, capsys):
    monkeypatch.setattr(step, "load", tiny)
    path = tmp_path / "step.json"
    options = step.Options(
        batch_size=8, device="cpu", steps=3, repeats=2, threads=1, json=path, profile=tmp_path / "traces"
    )
    assert step.run(options) == 0
    written, table = json.loads(path.read_text()), capsys.readouterr().out
    names = [result["name"] for result in written["results"]]
    assert names[0] == "eager"
    assert "channels_last" in names[1]
    assert names[2:] == ["+ compile", CHOSEN, SUPERVISED]
    assert uncompiled
    for result in written["results"]:
        assert result["name"] in table
        assert len(result["images_per_s"]) == 2
        assert result["peak_bytes"] > 0
        assert result["losses"][0] == result["losses"][1]  # Every round starts from the same state
        step_ms = 1e3 * 8 / result["images_per_s"][0]
        parts = {"forward", "backward", "optimizer"} | ({"loss"} if result["name"] != SUPERVISED else set())
        assert set(result["parts_ms"]) == parts
        assert 0.5 * step_ms < sum(values[0] for values in result["parts_ms"].values()) < step_ms
    _, autocast, _, chosen, supervised = written["results"]
    assert chosen["losses"] == autocast["losses"]  # The same on a CPU
    assert chosen["peak_bytes"] == pytest.approx(autocast["peak_bytes"], rel=0.1)
    limit = written["ceiling"]
    assert limit["share_of_supervised"] == 0.75
    assert limit["images_per_s"] == pytest.approx(0.75 * sum(supervised["images_per_s"]) / 2)
    assert {"environment", "commit", "device", "settings"} <= set(written)
    (trace,) = (tmp_path / "traces").iterdir()
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::convolution" in names
    assert str(trace) in table


def test_the_chosen_step_equals_that_of_a_run(uncompiled):
    config = tiny()
    batches = training.synthetic_batches(config, CPU)
    dtype = choose_dtype(config.train, CPU)
    chosen = training.candidates(config, CPU)[-2]
    chosen.measure(2)
    train_step = build_step(config, build_method(config, CPU), device=CPU, dtype=dtype)
    for index in range(2):
        batch = training.as_training(batches[index], dtype, torch.channels_last)
        output = train_step(batch, training.TrainProgress(index, training.NO_END, training.NO_END), config.optim.lr)
    assert chosen.result.losses == [output.loss.item()]


def test_variants_add_one_thing_each_and_end_with_the_options_of_the_run():
    config = tiny()
    own = replace(config.train, precision="bf16", compile="on")
    ways = training.variants(replace(config, train=own), CPU)
    asked = [(way.train.precision, way.train.compile, way.channels_last) for way in ways]
    assert asked == [("fp32", "off", False), ("auto", "off", True), ("auto", "on", True), ("bf16", "on", True)]
    assert ways[-1].train == own
    assert not any(way.train.cuda_graph for way in ways)


@pytest.mark.gpu
def test_a_gpu_has_a_row_with_a_cuda_graph():
    ways = training.variants(tiny(), torch.device("cuda"))
    assert [way.train.cuda_graph for way in ways] == [False, False, False, True, False]


def test_synthetic_views_have_the_sizes_dtype_and_layout_of_training():
    config = tiny("smog-cifar10")
    first, second = training.synthetic_batches(config, CPU)[:2]
    assert [view.shape for view in first.views] == [(8, 3, view.size, view.size) for view in config.views]
    assert not torch.equal(first.views[0], second.views[0])
    assert torch.equal(first.views[0], training.synthetic_batches(config, CPU)[0].views[0])
    given = training.as_training(first, torch.bfloat16, torch.channels_last)
    for view in given.views:
        assert view.dtype == torch.bfloat16
        assert view.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("preset", "with_gradient", "without_gradient", "share"),
    [
        ("mocov2-cifar10", 1, 1, 3 / 4),
        ("mocov2-symmetric-cifar10", 2, 2, 3 / 8),
        ("msvq-cifar10", 1, 3, 1 / 2),
    ],
)
def test_encoder_passes_are_counted(preset, with_gradient, without_gradient, share):
    config = tiny(preset)
    passes = training.encoder_passes(build_method(config, CPU), training.synthetic_batches(config, CPU)[0])
    assert passes == Passes(with_gradient, without_gradient)
    assert passes.share_of_supervised == pytest.approx(share)


def test_small_crops_count_by_their_pixels():
    config = tiny("smog-cifar10")
    passes = training.encoder_passes(build_method(config, CPU), training.synthetic_batches(config, CPU)[0])
    sizes = [view.size for view in config.views]
    learning, targets = [*sizes[:2], *sizes[4:]], sizes[2:4]
    assert passes.with_gradient == pytest.approx(sum(size**2 for size in learning) / sizes[0] ** 2)
    assert passes.without_gradient == pytest.approx(sum(size**2 for size in targets) / sizes[0] ** 2)


def made_up(name, images_per_s, **parts_ms):
    return Result(name, images_per_s=[images_per_s] * 3, parts_ms={part: [ms] * 3 for part, ms in parts_ms.items()})


def test_the_ceiling_and_the_cause_of_the_gap_follow_from_the_parts():
    # Supervised forward 10 + backward 20, so 40 ms with a key forward; measured are 43 + 5
    supervised = made_up(SUPERVISED, 100 / 0.032, forward=10, backward=20, optimizer=1)
    chosen = made_up(CHOSEN, 100 / 0.048, forward=21, loss=1, backward=20.5, optimizer=5)
    limit = step.ceiling(chosen, supervised, Passes(1, 1), 100)
    assert limit["images_per_s"] == pytest.approx(0.75 * 100 / 0.032)
    assert limit["step_ms"] == pytest.approx(32 / 0.75)
    assert limit["reached"] == pytest.approx(32 / 0.75 / 48)
    assert limit["beyond_ms"] == pytest.approx({"forward": 1, "loss": 1, "backward": 0.5, "optimizer": 4})
    assert limit["cause"] == "optimizer"
    assert limit["supervised_forward_share"] == pytest.approx(1 / 3)
    facts = {"ceiling": limit, "settings": {"batch_size": 100}, "method": "mocov2"}
    text = "\n".join(step._sentences(facts, chosen))
    assert "makes 1 passes with gradient and 1 without" in text
    assert "takes 48.0 ms and reaches 89% of the ceiling" in text
    assert "cause: optimizer, momentum encoder and queue, with 4.0 ms more than expected" in text


def test_with_a_graph_its_time_is_compared_as_a_whole():
    supervised = made_up(SUPERVISED, 100 / 0.031, graph=30, optimizer=1)
    chosen = made_up(CHOSEN, 100 / 0.045, graph=42, optimizer=1.5)
    limit = step.ceiling(chosen, supervised, Passes(1, 1), 100)
    assert limit["beyond_ms"] == pytest.approx({"graph": 2, "optimizer": 0.5})
    assert limit["supervised_forward_share"] is None


def test_a_variant_that_does_not_run_gets_a_note_and_the_chosen_one_an_error():
    def broken():
        raise RuntimeError("no compiler\nin a long story")

    batches = training.synthetic_batches(tiny(), CPU)
    candidate = Candidate("+ compile", broken, batches, lr=0.1)
    candidate.measure(1)
    assert candidate.result == Result("+ compile", note="does not run here: no compiler")
    with pytest.raises(TrainingError, match="chosen: the step does not run here: no compiler; try a smaller"):
        Candidate(CHOSEN, broken, batches, lr=0.1)


def test_the_supervised_step_trains_the_encoder_of_the_method():
    config = tiny()
    method = training.Supervised(build_method(config, CPU).encoder(), config.views[0])
    train_step = build_step(config, method, device=CPU, dtype=torch.float32)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    batch = training.synthetic_batches(config, CPU)[0]
    losses = [train_step(batch, training.TrainProgress(step, 10, 10), 0.05).loss.item() for step in range(4)]
    assert losses[-1] < losses[0]
    convolutions = [name for name, module in method.named_modules() if isinstance(module, nn.Conv2d)]
    assert all(
        not torch.equal(before[f"{name}.weight"], method.state_dict()[f"{name}.weight"]) for name in convolutions
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"batch_size": 12}, "--batch-size 12 was given; mocov2-cifar10 needs a multiple of 8"),
        ({"batch_size": 0}, "--batch-size 0 was given; it must be at least 1"),
        ({"steps": 0}, "--steps 0 was given"),
        ({"repeats": 0}, "--repeats 0 was given"),
        ({"threads": 0}, "--threads 0 was given"),
        ({"json": "no/folder/a.json"}, "--json no/folder/a.json was given; it must be the name of a file"),
        ({"preset": "mocov3"}, "unknown preset 'mocov3'"),
    ],
)
def test_bad_options_are_one_sentence(given, sentence, tmp_path):
    given = {name: tmp_path / value if name == "json" else value for name, value in given.items()}
    with pytest.raises(ConfigError) as error:
        step.configuration(step.Options(device="cpu", **given))
    assert sentence.replace("no/folder", f"{tmp_path}/no/folder") in str(error.value)
    assert "\n" not in str(error.value)


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    with step.torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_an_unwritable_trace_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--profile .*file cannot be written to"):
        write_trace(tmp_path / "file", "step", lambda: None)
