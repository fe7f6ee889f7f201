"""Labels that a method sees: a fraction of each class, a label list, and unlabeled images."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.cli import main
from fastssl.commands.pretrain import parse
from fastssl.config import from_json, to_json
from fastssl.data import open_splits
from fastssl.errors import ConfigError
from fastssl.train.build import train_sampler

SIZE = {"labeled": (12, 12), "more": (10, 15)}


def write_images(folder, names):
    rng = np.random.default_rng(len(names))
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE[folder.name], 3), dtype=np.uint8)).save(path)


@pytest.fixture
def data(tmp_path):
    """10 cats and 10 dogs to train on, 2 and 2 to test, 7 unlabeled images, and a list of two cats and a dog."""
    names = [f"train/{name}/{name}_{number}.png" for name in ("cat", "dog") for number in range(10)]
    names += [f"test/{name}/{name}_{number}.png" for name in ("cat", "dog") for number in range(10, 12)]
    write_images(tmp_path / "labeled", names)
    write_images(tmp_path / "more", [*(f"{number}.png" for number in range(4)), *(f"cat/{n}.png" for n in range(3))])
    (tmp_path / "list.txt").write_text("cat_3.png\ndog/dog_0.png\ncat_9.png\n")
    return tmp_path


def arguments(data, *more):
    text = f"--data.root {data}/labeled --data.workers 0 --model.width 0.0625 --model.splits 2 --method.queue-size 16"
    text += " --train.batch-size 8 --train.steps 2 --train.device cpu"
    return [*text.split(), *(part.format(data=data) for part in " ".join(more).split())]


def seen(data, *more):
    """Labels by file name that one epoch of training passes to the method."""
    config = parse(["unimoco-cifar10", *arguments(data, "--train.batch-size 1 --model.norm group", *more)])
    source = open_splits(config).train
    steps = train_sampler(config, source)
    batches = [steps[step] for step in range(steps.steps_per_epoch)]
    labels = {source.describe(int(batch.ids[0])): int(batch.labels[0]) for batch in batches}
    assert len(labels) == len(source)
    return labels


def known(labels):
    return {name.rsplit("/", 1)[1]: label for name, label in labels.items() if label != -1}


def test_a_list_reveals_only_the_labels_of_its_names(data):
    labels = seen(data, "--data.label-fraction 1 --data.label-list {data}/list.txt")
    assert len(labels) == 20
    assert known(labels) == {"cat_3.png": 0, "cat_9.png": 0, "dog_0.png": 1}


@pytest.mark.parametrize("more", ["", "--data.unlabeled {data}/more"])
def test_at_fraction_0_and_with_an_empty_list_all_labels_are_unknown(data, more):
    (data / "empty.txt").write_text("\n")
    count = 27 if more else 20
    for labels in (
        seen(data, "--data.label-fraction 0", more),
        seen(data, "--data.label-fraction 1 --data.label-list {data}/empty.txt", more),
    ):
        assert list(labels.values()) == [-1] * count


def test_a_fraction_is_taken_of_each_class(data):
    labels = seen(data, "--data.label-fraction 0.3")
    assert sorted(known(labels).values()) == [0] * 3 + [1] * 3
    everything = known(seen(data, "--data.label-fraction 1"))
    assert everything == {f"{name}_{n}.png": label for label, name in enumerate(("cat", "dog")) for n in range(10)}
    assert known(labels).items() <= everything.items()


@pytest.mark.parametrize(
    "labels", ["--data.label-fraction 0.3", "--data.label-fraction 1 --data.label-list {data}/list.txt"]
)
def test_an_unlabeled_folder_adds_images_and_no_labels(data, labels):
    joint = seen(data, labels, "--data.unlabeled {data}/more")
    assert len(joint) == 27
    assert sum("/more/" in name for name in joint) == 7
    assert known(joint) == known(seen(data, labels))
    assert all(label == -1 for name, label in joint.items() if "/more/" in name)


def test_unlabeled_images_come_last_and_only_in_training(data):
    train, test = open_splits(parse(["unimoco-cifar10", *arguments(data, "--data.unlabeled {data}/more")]))
    assert train.labels.tolist() == [0] * 10 + [1] * 10 + [-1] * 7
    assert test.labels.tolist() == [0, 0, 1, 1]
    # Without a test split, only labeled images are held out
    options = f"--data.root {data}/labeled/train --data.unlabeled {data}/more"
    train, test = open_splits(parse(["unimoco-cifar10", *options.split()]))
    assert train.labels.tolist() == [0] * 9 + [1] * 9 + [-1] * 7
    assert test.labels.tolist() == [0, 1]


@pytest.mark.parametrize("form", ["--data.label-list {data}/list.txt", "--data.label_list={data}/list.txt"])
def test_a_list_takes_the_place_of_the_presets_fraction(data, form):
    assert known(seen(data, form)) == {"cat_3.png": 0, "cat_9.png": 0, "dog_0.png": 1}


def test_names_that_are_not_found_are_counted(data, notes):
    (data / "list.txt").write_text("cat_3.png\nbird_1.png\ncat_11.png\n")
    labels = seen(data, "--data.label-fraction 1 --data.label-list {data}/list.txt")
    note, _ = notes.take()  # The other note is about the only class
    assert re.search(r"list\.txt: 2 of its names .* among them bird_1\.png", note)
    assert known(labels) == {"cat_3.png": 0}


@pytest.mark.parametrize("method", ["unimoco", "supcon", "mocov2"])
def test_known_labels_of_one_class_are_reported_for_methods_that_use_labels(data, method, notes):
    (data / "list.txt").write_text("\n".join(f"dog_{number}.png" for number in range(10)))
    config = parse([f"{method}-cifar10", *arguments(data, "--data.label-list {data}/list.txt")])
    train_sampler(config, open_splits(config).train)
    messages = notes.take()
    assert len(messages) == (method != "mocov2")
    start = "all known labels are one class, dog, so its images have no negatives"
    assert all(note.startswith(start) for note in messages)


def test_with_one_class_nothing_is_classified(data, capsys):
    root = data / "labeled" / "train"
    for path in (root / "dog").iterdir():
        path.unlink()
    (root / "dog").rmdir()
    options = f"--data.root {root} --data.label-fraction 1 --eval.every-epochs 1"
    code, folder, _ = run(data, options)
    assert code == 0
    assert "warning: all known labels are one class, cat" in capsys.readouterr().out
    assert "knn_top1" not in (folder / "metrics.jsonl").read_text()
    for protocol in ("knn", "linear"):
        assert main(["eval", protocol, str(folder)]) == 2
        messages = capsys.readouterr().err.splitlines()
        assert len(messages) == 1
        assert "are all of one class, and an evaluation needs two" in messages[0]


def test_the_new_paths_survive_json(data):
    options = "--data.label-fraction 1 --data.label-list {data}/list.txt --data.unlabeled {data}/more"
    config = parse(["unimoco-cifar10", *arguments(data, options)])
    assert from_json(to_json(config)) == config
    assert (config.data.label_list, config.data.unlabeled) == (data / "list.txt", data / "more")


def run(data, *more, preset="unimoco-cifar10"):
    """Train; returns the exit code, the run folder and the labels in the final queue."""
    folder = data / "run"
    code = main(["pretrain", preset, *arguments(data, f"--run.dir {folder}", *more)])
    (checkpoint,) = (folder / "checkpoints").glob("*2.pt")
    return code, folder, torch.load(checkpoint, weights_only=True)["method"]["queue.labels"].tolist()


def start(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def test_a_run_with_a_list_and_unlabeled_images_from_another_folder(data, monkeypatch, capsys):
    (data / "list.txt").write_text("\n".join(f"cat_{number}.png" for number in range(11)))
    monkeypatch.chdir(data)
    options = "--data.label-fraction 1 --data.label-list list.txt --data.unlabeled more --train.steps 2"
    code, folder, queue = run(data, options)
    assert code == 0
    config = from_json((folder / "config.json").read_text())
    assert (config.data.label_list, config.data.unlabeled) == (data / "list.txt", data / "more")
    assert (start(folder)["images"], start(folder)["labels"]) == (27, 10)
    assert "warning" in capsys.readouterr().out
    assert (
        "1 of its names match no labeled training image, among them cat_10.png" in (folder / "console.log").read_text()
    )
    # Two steps of 8 fill the queue of 16
    steps = train_sampler(config, open_splits(config).train)
    assert queue == [*steps[0].labels, *steps[1].labels]
    assert set(queue) == {-1, 0}


def test_a_run_without_labels_never_sees_one(data):
    code, folder, queue = run(data, "--data.label-fraction 0 --data.unlabeled {data}/more")
    assert (code, queue, start(folder)["labels"]) == (0, [-1] * 16, 0)


def test_a_run_resumes_only_with_its_original_labels(data, capsys):
    code, folder, _ = run(data, "--data.label-fraction 1 --data.label-list {data}/list.txt")
    assert code == 0
    before = (folder / "metrics.jsonl").read_text()
    assert main(["resume", str(folder)]) == 0
    good = (data / "list.txt").read_text()
    (data / "list.txt").write_text(good.replace("cat_9", "cat_8"))
    assert main(["resume", str(folder)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in ("labels that the method sees", "--data.label-list", str(folder)):
        assert word in error
    (data / "list.txt").write_text(good)
    assert main(["resume", str(folder)]) == 0
    assert (folder / "metrics.jsonl").read_text().splitlines()[0] == before.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data.label-list {data}/none.txt", ["{data}/none.txt cannot be read", "--data.label-list"]),
        ("--data.label-list {data}", ["{data} cannot be read", "--data.label-list"]),
        ("--data.label-list {data}/other.txt", ["it has a.png and the data set cat/cat_0.png", "--data.label-list"]),
        ("--data.label-list {data}/several.txt", ["x.png", "cat/x.png and dog/x.png", "--data.label-list"]),
        ("--data.label-list {data}/list.txt --data.root {data}/more/cat", ["has no labels", "--data.label-list"]),
        (
            "--data.label-list {data}/list.txt --data.label-fraction 0.5",
            ["--data.label-list {data}/list.txt", "fraction of 0.5", "--data.label-fraction 1"],
        ),
        ("--data.unlabeled {data}/none", ["{data}/none is not a folder", "--data.unlabeled"]),
        ("--data.unlabeled {data}/list.txt", ["line 1 of {data}/list.txt", "cannot be found", "--data.unlabeled"]),
        ("--data.unlabeled {data}/round", ["{data}/round is not a folder", "--data.unlabeled"]),
        ("--data.unlabeled {data}/nothing", ["{data}/nothing holds no", "--data.unlabeled"]),
        ("--data.unlabeled {data}/labeled", ["--data.unlabeled {data}/labeled", "overlap"]),
        ("--data.unlabeled {data}/labeled/test/cat", ["--data.unlabeled {data}/labeled/test/cat", "overlap"]),
    ],
)
def test_bad_label_options_are_one_sentence_and_leave_no_run(data, capsys, options, words):
    (data / "nothing").mkdir()
    (data / "round").symlink_to("round")
    (data / "other.txt").write_text("b.png\na.png\n")
    (data / "several.txt").write_text("x.png\n")
    write_images(data / "labeled", ["train/cat/x.png", "train/dog/x.png"])
    folder = data / "run"
    code = main(
        ["pretrain", "unimoco-cifar10", *arguments(data, f"--run.dir {folder} --data.label-fraction 1", options)]
    )
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert len(error.splitlines()) == 1
    for word in words:
        assert word.format(data=data) in error
    assert not folder.exists()


@pytest.mark.parametrize("option", ["--data.label-list", "--data.unlabeled"])
def test_embedded_pictures_take_neither_a_list_nor_more_images(option):
    with pytest.raises(ConfigError, match=rf"{option} /some/where was given without .*--data\.root") as raised:
        parse(["--data.label-fraction", "1", option, "/some/where"])
    assert "\n" not in str(raised.value)
