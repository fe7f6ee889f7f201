"""A run resumes only from its own checkpoints, with its own options and images."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fastssl.cli import main
from fastssl.commands.pretrain import parse
from fastssl.train import checkpoint
from fastssl.train.identity import facts_of_options
from tests.fastssl.test_runs import assert_same, final_state, records
from tests.faults.runs import PICTURES, TINY, contents, image_folder, refusal, train


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A finished run of 4 steps with a schedule that allows more; tests must not change it."""
    folder = tmp_path_factory.mktemp("runs") / "ours"
    assert train(folder, "--optim.schedule", "step") == 0
    return folder


@pytest.fixture
def run(ours, tmp_path):
    """A copy of `ours`."""
    return shutil.copytree(ours, tmp_path / "run")


def edit(run, option, value):
    """Change an option in config.json, like a user with an editor."""
    values = json.loads((run / "config.json").read_text())
    section, _, name = option.rpartition(".")
    (values[section] if section else values)[name] = value
    (run / "config.json").write_text(json.dumps(values))


# Options of another run, and words in the refusal.
FOREIGN = {
    "seed": (["--seed", "7"], ["--seed is 0", "was 7"]),
    "rate": (["--optim.lr", "0.5"], ["--optim.lr is", "was 0.5"]),
    "weight decay": (["--optim.weight-decay", "0.5"], ["--optim.weight-decay is", "was 0.5"]),
    "optimizer": (["--optim.optimizer", "adamw"], ["--optim.optimizer is sgd", "was adamw"]),
    "schedule": (["--optim.schedule", "cosine"], ["--optim.schedule is step", "was cosine"]),
    "batch": (["--train.batch-size", "16"], ["--train.batch-size is 8", "was 16"]),
    "precision": (["--train.precision", "fp32"], ["--train.precision is auto", "was fp32"]),
    "temperature": (["--method.temperature", "0.5"], ["--method.temperature is", "was 0.5"]),
    "momentum": (["--method.momentum", "0.5"], ["--method.momentum is", "was 0.5"]),
    "queue": (["--method.queue-size", "64"], ["--method.queue-size is 32", "was 64"]),
    "dim": (["--method.dim", "16"], ["--method.dim is 128", "was 16"]),
    "head": (["--method.head", "linear"], ["--method.head is", "was linear"]),
    "width": (["--model.width", "0.125"], ["--model.width is 0.0625", "was 0.125"]),
    "encoder": (["--model.encoder", "resnet34"], ["--model.encoder is resnet18", "was resnet34"]),
    "stem": (["--model.stem", "imagenet"], ["--model.stem is", "was imagenet"]),
    "norm": (["--model.norm", "group"], ["--model.norm is", "was group"]),
    "labels": (["--data.label-fraction", "1"], ["--data.label-fraction is 0.1", "was 1"]),
    "images": (["--data.pictures", "48"], ["--data.pictures is 40", "was 48"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("difference", FOREIGN)
def test_a_checkpoint_of_another_run_is_refused_with_both_values(run, tmp_path, capsys, difference):
    more, words = FOREIGN[difference]
    assert train(tmp_path / "other", "--optim.schedule", "step", *more, steps=6) == 0
    (theirs,) = (tmp_path / "other" / "checkpoints").glob("step_000000006.pt")
    shutil.copy(theirs, run / "checkpoints")
    before = contents(run)
    for command in (["resume", str(run)], ["eval", "knn", str(run)]):
        error = refusal(capsys, command)
        for word in [*words, "step_000000006.pt"]:
            assert word in error
    assert contents(run) == before


@pytest.mark.parametrize("preset", ["mocov2-cifar10", "mixco-cifar10", "unmix-cifar10", "ressl-cifar10", "co2-cifar10"])
def test_a_checkpoint_of_another_method_is_refused(run, tmp_path, capsys, preset):
    assert train(tmp_path / "other", "--optim.schedule", "step", preset=preset, steps=6) == 0
    shutil.copy(tmp_path / "other" / "checkpoints" / "step_000000006.pt", run / "checkpoints")
    for command in (["resume", str(run)], ["eval", "knn", str(run)]):
        assert "in the run that wrote" in refusal(capsys, command)


def without(name):
    def change(state):
        del state[name]

    return change


def renamed(state):
    weights = state["method"]
    weights["elsewhere"] = weights.pop(next(iter(weights)))


def reshaped(state):
    name, value = next(iter(state["method"].items()))
    state["method"][name] = torch.cat([value, value])


def of_adamw(state):
    for group in state["optimizer"]["param_groups"]:
        group["betas"] = (0.9, 0.999)


def momentum_of_other_weights(state):
    values = next(value for value in state["optimizer"]["state"].values() if value.get("momentum_buffer") is not None)
    values["momentum_buffer"] = torch.zeros(3, 3)


def fewer_groups(state):
    state["optimizer"]["param_groups"] = []


def other_statistics(state):
    state["statistics"] = torch.zeros(1, 7)


FORGED = {
    **{f"no {part}": (without(part), f"it has no {part}") for part in ("method", "statistics", "optimizer", "scaler")},
    **{f"no {part}": (without(part), f"it has no {part}") for part in ("skipped", "window", "facts", "length")},
    "weights of another name": (renamed, "(2 such)"),
    "weights of another shape": (reshaped, "size mismatch"),
    "another optimizer": (of_adamw, "the option betas"),
    "momentum of another shape": (momentum_of_other_weights, "momentum_buffer has shape [3, 3]"),
    "no parameter groups": (fewer_groups, "its optimizer"),
    "other statistics": (other_statistics, "its statistics"),
}


@pytest.mark.parametrize("forgery", FORGED)
def test_a_forged_checkpoint_with_a_valid_checksum_is_one_sentence(run, capsys, forgery):
    change, words = FORGED[forgery]
    path = run / "checkpoints" / "step_000000004.pt"
    state = checkpoint.load(path)
    change(state)
    checkpoint.save(path.parent, state, step=4, keep=9)
    error = refusal(capsys, ["resume", str(run)])
    assert words in error
    assert "step_000000004.pt" in error


@pytest.mark.parametrize("step", [-1, 10**12, True, "4", None])
def test_an_impossible_step_makes_a_checkpoint_damaged(ours, run, step):
    path = run / "checkpoints" / "step_000000004.pt"
    state = {**checkpoint.load(path), "step": step}
    with path.open("wb") as file:
        checkpoint._write_with_checksum(state, file)
    assert main(["resume", str(run)]) == 0
    assert "says that it was written after step" in (run / "console.log").read_text()
    assert_same(final_state(run), final_state(ours))


EDITS = {
    "seed": ("seed", 5),
    "batch": ("train.batch_size", 16),
    "temperature": ("method.temperature", 0.9),
    "queue": ("method.queue_size", 64),
    "optimizer": ("optim.optimizer", "adamw"),
    "width": ("model.width", 0.125),
    "accumulate": ("train.accumulate", 2),
    "clip": ("optim.clip_norm", 1.0),
    "method": ("method", {"name": "mocov2", "queue_size": 32}),
}


@pytest.mark.parametrize("change", EDITS)
def test_an_edited_configuration_is_refused_with_the_option(run, capsys, change):
    option, value = EDITS[change]
    edit(run, option, value)
    before = contents(run)
    error = refusal(capsys, ["resume", str(run)])
    assert option.replace("_", "-") in error
    assert contents(run) == before


HARMLESS = {
    "log period": ("train.log_every", 2),
    "checkpoint period": ("train.checkpoint_every", 3),
    "workers": ("data.workers", 1),
    "prefetch": ("data.prefetch", 3),
    "pipeline": ("data.pipeline", "torchvision"),
    "kept": ("train.keep_checkpoints", 5),
    "votes": ("eval.k", 5),
    "time-out": ("train.timeout_s", 30.0),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_edits_are_accepted_and_logged(ours, run, change):
    option, value = HARMLESS[change]
    edit(run, option, value)
    (run / "checkpoints" / "step_000000004.pt").unlink()
    assert main(["resume", str(run)]) == 0
    notes = [record["text"] for record in records(run) if record["event"] == "note"]
    assert notes == [
        f"--{option.replace('_', '-')} is {value} from here on and was "
        f"{facts_of_options(parse([*TINY, *PICTURES]))[option]} before"
    ]
    if option != "data.pipeline":  # Its pixels differ in their last bits
        assert_same(final_state(run)["method"], final_state(ours)["method"])


def test_a_run_may_become_longer_if_its_past_schedule_is_the_same(run, tmp_path):
    edit(run, "train.steps", 7)
    assert main(["resume", str(run)]) == 0
    assert train(tmp_path / "long", "--optim.schedule", "step", steps=7) == 0
    assert_same(final_state(run), final_state(tmp_path / "long"))
    assert "--train.steps is 7 from here on and was 4 before" in (run / "console.log").read_text()


@pytest.mark.parametrize("schedule", ["cosine", "cosine-epoch"])
def test_a_cosine_run_of_another_length_is_refused(tmp_path, capsys, schedule):
    folder = tmp_path / "run"
    assert train(folder, "--optim.schedule", schedule, "--optim.warmup-epochs", "0", steps=6) == 0
    edit(folder, "train.steps", 30)
    error = refusal(capsys, ["resume", str(folder)])
    for word in ("6 steps", "30 now", f"--optim.schedule {schedule}", "--train.steps"):
        assert word in error


def test_a_run_cannot_become_shorter_than_its_past(run, capsys):
    edit(run, "train.steps", 3)
    assert "completed 4 steps" in refusal(capsys, ["resume", str(run)])


def test_nothing_is_bound_before_the_first_checkpoint(run):
    shutil.rmtree(run / "checkpoints")
    edit(run, "seed", 5)
    assert main(["resume", str(run)]) == 0
    assert final_state(run)["step"] == 4


@pytest.fixture
def on_images(tmp_path):
    """A run on class folders, and the folder of these."""
    data = image_folder(tmp_path / "data")
    assert train(tmp_path / "run", data=["--data.root", str(data)], preset="mocov2-cifar10", steps=2) == 0
    edit(tmp_path / "run", "train.steps", 2)
    return tmp_path / "run", data


def fewer(data):
    for number in range(3):
        (data / "cat" / f"{number}.png").unlink()


def more(data):
    shutil.copy(data / "cat" / "1.png", data / "cat" / "99.png")


def another_name(data):
    (data / "cat" / "1.png").rename(data / "cat" / "10000.png")


def another_class(data):
    (data / "cat").rename(data / "zebra")


def another_size(data):
    shutil.copy(data / "cat" / "1.png", data / "cat" / "2.png")
    (data / "cat" / "2.png").write_bytes((data / "cat" / "1.png").read_bytes() + bytes(10))


@pytest.mark.parametrize("change", [fewer, more, another_name, another_class, another_size])
def test_a_run_does_not_resume_with_other_images(on_images, capsys, change):
    run, data = on_images
    change(data)
    before = contents(run)
    error = refusal(capsys, ["resume", str(run)])
    assert "training images" in error
    assert "--data.root" in error
    assert contents(run) == before


def test_images_that_moved_are_the_same_images(on_images):
    run, data = on_images
    moved = data.rename(data.with_name("moved"))
    edit(run, "data.root", str(moved))
    assert main(["resume", str(run)]) == 0
    assert f"--data.root is {moved} from here on" in (run / "console.log").read_text()


def test_an_evaluation_reports_missing_images(on_images, capsys):
    run, data = on_images
    assert main(["eval", "knn", str(run)]) == 0
    assert "note" not in capsys.readouterr().out
    fewer(data)
    assert main(["eval", "knn", str(run)]) == 0
    assert "not the training images of the run" in capsys.readouterr().out


def test_the_identity_is_in_checkpoint_log_and_configuration(ours):
    state, start = final_state(ours), records(ours)[0]
    config = json.loads((ours / "config.json").read_text())
    assert start["identity"] == config["identity"]["digest"]
    assert state["facts"]["images.count"] == start["facts"]["images.count"] == config["identity"]["images.count"] == 40
    assert state["facts"]["method.temperature"] == config["method"]["temperature"]
