"""`fastssl eval knn|linear` on complete runs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.cli import main
from fastssl.commands.evaluate import LinearOptions, open_run
from fastssl.evaluate.features import extract_features
from fastssl.evaluate.linear import Recipe
from fastssl.evaluate.linear_crops import train_on_crops

TINY = "--model.width 0.0625 --model.splits 2 --method.queue-size 64 --train.batch-size 16 --train.checkpoint-every 5"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    arguments = f"{TINY} --data.pictures 240 --train.steps 10 --run.dir {folder}"
    assert main(["pretrain", *arguments.split()]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def evaluate(run, arguments):
    protocol, *options = arguments.split()
    assert main(["eval", protocol, str(run), *options]) == 0
    return json.loads((run / f"eval-{protocol}.json").read_text())


def test_knn_of_a_run_equals_the_last_one_during_training(run, capsys):
    result = evaluate(run, "knn")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["top1"] == pytest.approx(last["knn_top1"])
    assert result["top1"] <= result["top5"] <= 100
    assert result["seconds"] > 0
    expected = {"step": 10, "train_images": 240, "test_images": 48, "k": 200, "temperature": 0.1}
    assert {name: result[name] for name in expected} == expected
    assert f"top-1 {result['top1']:.2f} %" in capsys.readouterr().out


def test_options_of_knn(run):
    result = evaluate(run, f"knn --k 3 --temperature 0.5 --checkpoint {run}/checkpoints/step_000000005.pt")
    assert (result["k"], result["temperature"], result["step"]) == (3, 0.5, 5)


def test_linear_probe_of_a_run(run, capsys):
    result = evaluate(run, "linear --epochs 30 --lr 1 0.1 10")
    expected = {"protocol": "cached", "schedule": "cosine", "epochs": 30, "batch_size": 240, "step": 10, "seed": 0}
    assert {name: result[name] for name in expected} == expected
    assert list(result["held_out_top1"]) == ["0.1", "1", "10"]
    assert result["held_out_top1"][f"{result['lr']:g}"] == max(result["held_out_top1"].values())
    assert 0 <= result["top1"] <= result["top5"] <= 100
    assert "cached protocol" in capsys.readouterr().out


def test_a_linear_probe_separates_bright_from_dark_images(run, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 20)):
        for name, level in (("dark", 60), ("bright", 190)):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                image = (level + rng.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(tmp_path / split / name / f"{index}.png")
    assert evaluate(run, f"linear --epochs 30 --data {tmp_path}")["top1"] == 100


def test_the_same_run_gives_the_same_results(run):
    first, again = (evaluate(run, "linear --epochs 3 --batch-size 32") for _ in range(2))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


@pytest.mark.parametrize(("schedule", "words"), [("", "step"), ("--schedule cosine", "cosine")])
def test_full_protocol(run, capsys, schedule, words):
    result = evaluate(run, f"linear --protocol full --epochs 2 --lr 0.01 --batch-size 64 {schedule}")
    expected = {"protocol": "full", "schedule": words, "lr": 0.01, "epochs": 2, "batch_size": 64, "train_images": 240}
    assert {name: result[name] for name in expected} == expected
    assert 0 <= result["top1"] <= result["top5"] <= 100
    out = capsys.readouterr().out
    assert "epoch 1/2: loss" in out
    assert "epoch 2/2: loss" in out


@pytest.mark.slow
def test_the_full_protocol_learns_from_shuffled_images_and_keeps_the_encoder_frozen(run, monkeypatch):
    """Tested on its training images, to avoid the noise of a tiny test split."""
    frozen = open_run(LinearOptions(run=run))
    frozen.encoder.train()
    before = {name: value.clone() for name, value in frozen.encoder.state_dict().items()}
    features = extract_features(frozen.encoder, frozen.train, frozen.config.eval_view, dtype=frozen.dtype)
    scale = float(features.rows.norm(dim=1).mean())
    losses, order, stream = [], [], frozen.train.stream

    def recorded(steps, first, last):
        for batch in stream(steps, first, last):
            order.extend(batch.ids.tolist())
            yield batch

    monkeypatch.setattr(frozen.train, "stream", recorded)
    train_on_crops(
        frozen.encoder,
        frozen.train,
        size=32,
        lr=1 / scale**2,
        recipe=Recipe(epochs=20, batch_size=48, schedule="cosine"),
        dtype=frozen.dtype,
        info=lambda text: losses.append(float(text.split("loss ")[1].split(",")[0])),
    )
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in frozen.encoder.state_dict().items())
    first, second = order[:240], order[240:480]
    assert sorted(first) == sorted(second) == list(range(240))
    assert first != second != sorted(second)


def test_a_non_finite_loss_is_one_sentence(run, capsys):
    arguments = f"{run} --protocol full --epochs 3 --lr 1e37 --batch-size 16"
    assert main(["eval", "linear", *arguments.split()]) == 1
    error = capsys.readouterr().err.strip()
    assert "--lr" in error
    assert len(error.splitlines()) == 1
    assert not (run / "eval-linear.json").exists()


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 6)):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (20, 24, 3), dtype=np.uint8) + np.uint8(50 * (name == "dog"))
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def run_on_a_folder(image_folder, tmp_path):
    folder = tmp_path / "folder-run"
    arguments = f"{TINY} --data.root {image_folder} --train.steps 2 --data.workers 0 --run.dir {folder}"
    assert main(["pretrain", "mocov2-cifar10", *arguments.split()]) == 0
    return folder


def test_nothing_is_chosen_on_test_labels(run_on_a_folder, image_folder, capsys):
    """With swapped test classes, the chosen rate and all held-out scores stay, and every hit becomes a miss."""
    arguments = "linear --epochs 20 --lr 0.1 1 10"
    before = evaluate(run_on_a_folder, arguments)
    test = image_folder / "test"
    (test / "cat").rename(test / "other")
    (test / "dog").rename(test / "cat")
    (test / "other").rename(test / "dog")
    after = evaluate(run_on_a_folder, arguments)
    for name in ("lr", "held_out_top1", "feature_scale"):
        assert after[name] == before[name]
    assert after["top1"] == pytest.approx(100 - before["top1"])
    assert before["top1"] != 50


def test_data_can_move(run_on_a_folder, image_folder, tmp_path, capsys):
    before = evaluate(run_on_a_folder, "knn --k 5")
    image_folder.rename(tmp_path / "elsewhere")
    assert main(["eval", "knn", str(run_on_a_folder)]) == 2
    assert "--data" in capsys.readouterr().err
    after = evaluate(run_on_a_folder, f"knn --k 5 --data {tmp_path / 'elsewhere'}")
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


def test_the_unlabeled_images_of_a_run_are_not_needed(image_folder, tmp_path):
    unlabeled, folder = tmp_path / "unlabeled", tmp_path / "with-unlabeled"
    shutil.copytree(image_folder / "train", unlabeled)
    arguments = f"{TINY} --data.root {image_folder} --data.unlabeled {unlabeled} --train.steps 2 --data.workers 0"
    assert main(["pretrain", "mocov2-cifar10", *arguments.split(), "--run.dir", str(folder)]) == 0
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    shutil.rmtree(unlabeled)
    result = evaluate(folder, "knn")
    assert (result["train_images"], result["test_images"]) == (48, 12)
    assert result["top1"] == pytest.approx(last["knn_top1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["knn", "linear"]),
        ("lineal {run}", ["lineal", "did you mean 'linear'"]),
        ("knn", ["no run was given"]),
        ("knn /no/such/run", ["/no/such/run", "config.json"]),
        ("knn {empty}", ["{empty}", "checkpoint", "resume"]),
        ("knn {run} --checkpoint /no/such.pt", ["/no/such.pt"]),
        ("knn {run} --k 0", ["--k 0", "at least 1"]),
        ("knn {run} --temperature 0", ["--temperature 0", "at least 0.001"]),
        ("knn {run} --lr 1", ["--lr"]),
        ("linear {run} --lr 0", ["--lr 0", "above 0"]),
        ("linear {run} --lr 1 -2", ["--lr 1 -2", "above 0"]),
        ("linear {run} --protocol full --lr 1 2", ["--protocol full", "--lr"]),
        ("linear {run} --epochs 0", ["--epochs 0"]),
        ("linear {run} --batch-size 0", ["--batch-size 0"]),
        ("linear {run} --data /no/such/data", ["/no/such/data", "--data"]),
        ("linear {run} --data {flat}", ["{flat}", "no labels", "--data"]),
        ("linear {run} --device cuda", ["--device cuda"]),
        ("linear {wide}", ["--model.width is 0.125", "was 0.0625", "{wide}/checkpoints"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(finished, tmp_path, capsys, arguments, words):
    if "--device cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here, so asking for it is no mistake")
    names = {"run": finished, **{name: tmp_path / name for name in ("empty", "flat", "wide")}}
    shutil.copytree(finished, names["wide"])
    config = json.loads((finished / "config.json").read_text())
    config["model"]["width"] = 0.125
    (names["wide"] / "config.json").write_text(json.dumps(config))
    names["empty"].mkdir()
    shutil.copy(finished / "config.json", names["empty"])
    names["flat"].mkdir()
    for i in range(20):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(names["flat"] / f"{i}.png")
    assert main(["eval", *arguments.format(**names).split()]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    for word in words:
        assert word.format(**names) in error


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "linear", "--help"])
    assert stop.value.code == 0
    assert "--protocol" in capsys.readouterr().out
