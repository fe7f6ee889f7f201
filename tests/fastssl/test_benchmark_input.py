"""`fastssl bench input`: every candidate is measured, and the peer pipelines produce the preset's views."""

from __future__ import annotations

import json
import math
import os
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.__main__ import main as bench_main
from fastssl.benchmark import rates
from fastssl.benchmark.peer_pipelines import dali_batches, pil_batches, pil_transform
from fastssl.cli import main
from fastssl.commands import bench_input
from fastssl.data import split_roots
from fastssl.device import choose_dtype
from fastssl.presets import load
from fastssl.train.build import train_sampler
from fastssl_pipelines.executors.base import available_executors, build_executor
from fastssl_pipelines.sources.open import open_source
from fastssl_pipelines.views import ViewSpec

TINY = ["--seconds", "0.05", "--repeats", "1", "--batch-size", "4", "--workers", "1", "--device", "cpu"]
CPU = torch.device("cpu")
PLAIN = ViewSpec(size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter_probability=0.0, grayscale=0.0)
needs_dali = pytest.mark.skipif(bool(available_executors()["dali"]), reason="needs DALI")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 images, each of a single color."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(16):
        path = folder / "train" / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (10 * index, 200 - 10 * index, 60)).save(path, quality=95)
    return folder


def config_of(preset: str = "mocov2-cifar10", views=None, **data):
    config = load(preset)
    train = replace(config.train, batch_size=4, device="cpu")
    model = replace(config.model, norm="local")
    data = replace(config.data, workers=1, **data)
    return replace(config, train=train, model=model, data=data, views=views or config.views)


@pytest.mark.slow
def test_all_candidates_are_measured_and_written(root, tmp_path, capsys):
    path = tmp_path / "input.json"
    assert main(["bench", "input", "mocov2-cifar10", "--root", str(root), *TINY, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    table = capsys.readouterr().out
    expected = {"Pillow DataLoader", "fastssl torchvision", "fastssl resident"}
    if not available_executors()["dali"]:
        expected |= {"DALI, own random ops", "fastssl dali cpu", "fastssl dali cpu-region"}
    assert {result["name"] for result in written["results"]} == expected
    for result in written["results"]:
        assert result["name"] in table
        ours = result["name"].startswith("fastssl")
        rates_of = result["images_per_s"] + result["augment_off_images_per_s"]
        assert len(rates_of) == 1 + ours
        assert all(0 < rate < math.inf for rate in rates_of)
        assert set(result["stages_ms"]) == (set(rates.STAGES) if ours else set())
    assert written["images"]["count"] == 16
    dtype = str(choose_dtype(load("mocov2-cifar10").train, CPU)).removeprefix("torch.")  # As in training
    assert written["settings"] | {"batch_size": 4, "device": "cpu", "dtype": dtype} == written["settings"]
    assert written["plan_ms"]["median"] > 0
    assert str(path) in table


def test_photographs_are_generated_once(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path))
    arguments = ["input", "mocov2-cifar10", "--images", "4", "--pipelines", "resident", *TINY]
    assert bench_main(arguments) == 0
    assert "generating 4 photographs" in capsys.readouterr().err
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    assert len(files) == 4
    assert bench_main(arguments) == 0
    assert "drawing" not in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")} == files


def test_an_executor_that_cannot_read_the_images_is_left_out_with_a_note(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastssl_pipelines.executors.resident._available_host_bytes", lambda: 1000)
    path = tmp_path / "input.json"
    arguments = ["--root", str(root), "--pipelines", "resident", *TINY, "--repeats", "2", "--json", str(path)]
    assert main(["bench", "input", "mocov2-cifar10", *arguments]) == 0
    resident = json.loads(path.read_text())["results"][-1]
    assert resident["images_per_s"] == []
    (note,) = resident["notes"]
    assert "GiB free" in note
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["pillow", pytest.param("dali", marks=needs_dali)])
def test_plain_views_of_a_peer_are_the_normalized_images(root, recipe):
    config = config_of(views=(PLAIN, replace(PLAIN, size=16)))
    source = open_source(split_roots(root)[0])
    files = sorted(root.rglob("*.jpg"))
    opened = pil_batches(config, source, CPU) if recipe == "pillow" else dali_batches(config, files, CPU)
    with closing(opened) as batches:
        seen = list(islice(batches, 4))
    colors = np.concatenate([_colors(first, config) for first, _ in seen])
    expected = np.array([[10 * index, 200 - 10 * index, 60] for index in range(16)])
    assert np.abs(colors[colors[:, 0].argsort()] - expected).max() < 3  # JPEG is lossy
    for first, second in seen:
        assert (first.shape, second.shape) == ((4, 3, 32, 32), (4, 3, 16, 16))
        assert first.dtype == torch.float32
        assert np.abs(_colors(first, config) - _colors(second, config)).max() < 1


def _colors(views: torch.Tensor, config) -> np.ndarray:
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
    return 255 * (views.cpu() * std + mean).mean((2, 3)).numpy()


@needs_dali
def test_the_random_operations_of_the_dali_peer_have_their_effects(root):
    files = sorted(root.rglob("*.jpg"))

    def first(view: ViewSpec) -> tuple[torch.Tensor, np.ndarray]:
        config = config_of(views=(view, view))
        with closing(dali_batches(config, files, CPU)) as batches:
            views = next(batches)[0].clone()
        return views, _colors(views, config)

    _, gray = first(replace(PLAIN, grayscale=1.0))
    assert np.ptp(gray, axis=1).max() < 2
    _, jittered = first(replace(PLAIN, jitter_probability=1.0))
    _, plain = first(PLAIN)
    assert np.abs(jittered - plain).max() > 10
    _, blurred = first(replace(PLAIN, blur=1.0))
    assert np.abs(blurred - plain).max() < 1  # A single color has nothing to blur


def test_the_pillow_peer_has_the_operations_of_the_view():
    def names(view: ViewSpec) -> list[str]:
        return [type(step).__name__ for step in pil_transform(view, (0, 0, 0), (1, 1, 1)).transforms]

    assert names(PLAIN) == ["RandomResizedCrop", "ToTensor", "Normalize"]
    assert names(ViewSpec(size=32, blur=0.5, solarize=0.2)) == [
        "RandomResizedCrop",
        "RandomApply",
        "RandomGrayscale",
        "RandomApply",
        "RandomSolarize",
        "RandomHorizontalFlip",
        "ToTensor",
        "Normalize",
    ]


def test_decoding_alone_keeps_the_region_that_the_views_need(root):
    config = config_of()
    source = open_source(split_roots(root)[0])
    plan = train_sampler(config, source)[0]
    alone = rates._decoding_alone(plan)

    def ends(of):
        boxes = np.stack([view.boxes for view in of.views])
        return boxes[..., :2].min(0).tolist(), (boxes[..., :2] + boxes[..., 2:]).max(0).tolist()

    assert ends(alone) == ends(plan)
    executor = build_executor("torchvision", source, mean=config.data.mean, std=config.data.std)
    assert [crop.shape for crop in executor.crops(alone)] == [(4, 1, 1, 3)] * 2


def test_the_rate_counts_images_of_whole_groups():
    consumed = []

    def batches():
        for index in range(100):
            consumed.append(index)
            yield (torch.zeros(4, 3, 8, 8),)

    start_s, images_per_s = rates.rate(batches, group=3, seconds=1e-9)
    assert len(consumed) == 9  # Two groups to warm up and one that counts
    assert start_s > 0
    assert images_per_s > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["steps"], "unknown benchmark 'steps'"),
        (["input", "--workers", "0"], "--workers 0 was given; it must be at least 1"),
        (["input", "--seconds", "0"], "--seconds 0.0 was given; it must be above 0"),
        (["input", "--pipelines", "ffcv"], "--pipelines"),
        (["input", "--json", "no/folder/a.json"], "it must be the name of a file in an existing folder"),
        (["input", "mocov3"], "unknown preset 'mocov3'"),
        (["input", "--root", "no/folder"], "no/folder"),
        (["input", "--images", "3"], "--batch-size 64 was given; it must be at most the 3 images of"),
        (["input", "--sconds", "3"], "--sconds"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    assert main(["bench", *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("generating")]
    assert len(error) == 1
    assert sentence in error[0]


def test_a_pipeline_that_is_not_installed_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(bench_input, "available_executors", lambda: {"dali": "it is not installed", "resident": None})
    assert main(["bench", "input", "--pipelines", "dali"]) == 2
    assert "--pipelines dali was given; it does not work here: it is not installed" in capsys.readouterr().err


def test_large_sources_are_sampled_without_defective_images(root, monkeypatch):
    source = open_source(split_roots(root)[0])
    source.defects = {3: "broken"}
    monkeypatch.setattr(bench_input, "IMAGES_AT_MOST", 8)
    kept = bench_input._readable(source)
    names = [kept.name_of(index) for index in range(len(kept))]
    assert len(set(names)) == 8
    assert source.name_of(3) not in names
    assert {name[0] for name in names} == {"a", "b"}


def test_the_default_workers_are_those_of_a_run(monkeypatch, root, tmp_path, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12), raising=False)
    path = tmp_path / "input.json"
    at = TINY.index("--workers")
    arguments = ["--root", str(root), "--pipelines", "resident", *TINY[:at], *TINY[at + 2 :], "--json", str(path)]
    assert main(["bench", "input", *arguments]) == 0
    assert json.loads(path.read_text())["settings"]["workers"] == 3
    assert " 3 workers, " in capsys.readouterr().out
