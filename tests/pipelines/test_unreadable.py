"""Unreadable images: the next in plan order replaces them, for every executor, unless there are many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastssl_pipelines import (
    DataError,
    EvaluationSampler,
    Executor,
    ImageFolder,
    TrainSampler,
    UnreadableImages,
    available_executors,
    build_executor,
)
from tests.pipelines.photos import NORMALIZATION, plan_of, save_photos

NAMES = ("resident", "torchvision", "dali")
COUNT = 240
CUT, GONE = 100, 17


def build(name: str, source: ImageFolder, workers: int = 0, **options) -> Executor:
    if reason := available_executors()[name]:
        pytest.skip(f"{name}: {reason}")
    return build_executor(name, source, workers=workers, **NORMALIZATION, **options)


@pytest.fixture
def folder(tmp_path) -> ImageFolder:
    """240 images; one is cut after a good header, another was deleted after the index was built."""
    paths = save_photos(tmp_path, COUNT)
    content = paths[CUT].read_bytes()
    paths[CUT].write_bytes(content[: len(content) * 2 // 3])
    source = ImageFolder(tmp_path)
    paths[GONE].unlink()
    return source


def masked(*bad: int) -> np.ndarray:
    mask = np.zeros(COUNT, bool)
    mask[list(bad)] = True
    return mask


def test_the_next_image_in_plan_order_replaces_it_with_the_values_of_the_position(folder):
    plan = plan_of(folder)
    order = plan.batch(0, 0, COUNT).ids
    bad = order[[3, 4, COUNT - 1]]
    batch = plan.batch(0, 0, COUNT, unreadable=masked(*bad))
    assert batch.ids[[3, 4, COUNT - 1]].tolist() == [order[5], order[5], order[0]]
    assert np.flatnonzero(batch.replaced).tolist() == [3, 4, COUNT - 1]
    kept = ~batch.replaced
    assert (batch.ids == order)[kept].all()
    np.testing.assert_array_equal(batch.views[0].hue, plan.batch(0, 0, COUNT).views[0].hue)


def test_boxes_are_those_of_the_replacement(tmp_path):
    save_photos(tmp_path, 1, height=400, width=500)
    small = tmp_path / "small"
    small.mkdir()
    save_photos(small, 1, height=10, width=12)
    source = ImageFolder(tmp_path, labeled=False)
    assert sorted(source.widths.tolist()) == [12, 500]
    plan = plan_of(source)
    bad = source.widths == 500
    boxes = plan.batch(0, 0, 2, unreadable=bad).views[0].boxes
    assert (boxes[:, 0] + boxes[:, 2] <= 10).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 12).all()


def test_ranks_and_restarts_agree_on_the_replacement(folder):
    steps, mask = TrainSampler(plan_of(folder), batch_size=40), masked(CUT, GONE)
    for step in range(12):
        one = steps.at(step, mask)
        for world_size in (2, 4):
            ranks = [
                TrainSampler(plan_of(folder), batch_size=40 // world_size, rank=rank, world_size=world_size)
                for rank in range(world_size)
            ]
            assert np.concatenate([rank.at(step, mask).ids for rank in ranks]).tolist() == one.ids.tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_training_continues_and_logs_what_was_replaced(name, workers, folder, notes):
    executor = build(name, folder, workers=workers)
    steps = TrainSampler(plan_of(folder), batch_size=40)
    batches = list(executor.stream(steps, 0, 12))
    assert [batch.step for batch in batches] == list(range(12))
    assert set(executor.unreadable) == {CUT, GONE}
    for batch in batches:
        assert batch.ids.tolist() == steps.at(batch.step, masked(CUT, GONE)).ids.tolist()
    text = " ".join(notes.take())
    assert "017.jpg cannot be read" in text
    assert "100.jpg cannot be read" in text
    assert text.count("the next image takes its place") == 2


@pytest.mark.parametrize("name", ["resident", "dali"])
def test_all_executors_use_the_same_replacement(name, folder):
    steps = TrainSampler(plan_of(folder), batch_size=40)
    found = zip(build(name, folder).stream(steps, 0, 6), build("torchvision", folder).stream(steps, 0, 6), strict=True)
    for batch, expected in found:
        assert torch.equal(batch.ids, expected.ids)
        for view, other in zip(batch.views, expected.views, strict=True):
            assert (view - other).abs().mean() < 0.02


def test_a_run_that_starts_later_has_the_same_batches(folder):
    steps = TrainSampler(plan_of(folder), batch_size=40)
    whole = list(build("torchvision", folder).stream(steps, 0, 12))
    for one, other in zip(whole[7:], build("torchvision", folder).stream(steps, 7, 12), strict=True):
        assert torch.equal(one.ids, other.ids)
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_leaves_it_out(name, folder):
    plan = plan_of(folder, shuffle=False)
    plan.labels = np.arange(COUNT) % 5
    steps = EvaluationSampler(plan, batch_size=64)
    labels = torch.cat([batch.labels for batch in build(name, folder).stream(steps, 0, len(steps))])
    expected = np.where(masked(CUT, GONE), -1, plan.labels)
    assert labels.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_more_than_one_in_a_hundred_stops_the_run(name, folder, tmp_path):
    for number in (50, 51):
        (tmp_path / f"{number:03}.jpg").write_bytes(b"")
    message = r"3 of the 240 images of .* more than 1%: .*jpg cannot be read.*--data\.quarantine|4 of the 240"
    with pytest.raises(DataError, match=message) as raised:
        list(build(name, folder).stream(TrainSampler(plan_of(folder), batch_size=40), 0, 6))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_a_single_plan_names_all_its_unreadable_images(name, folder):
    with pytest.raises(UnreadableImages) as raised:
        build(name, folder).batch(plan_of(folder).batch(0, 0, COUNT), 0)
    # A missing file is known before anything is decoded
    assert set(raised.value.reasons) in ({CUT, GONE}, {GONE})


def test_what_the_index_could_not_read_is_known_from_the_start(tmp_path):
    save_photos(tmp_path, 150)
    (tmp_path / "007.jpg").write_bytes(b"")
    source = ImageFolder(tmp_path)
    assert list(source.defects) == [7]
    executor = build("torchvision", source)
    assert list(executor.unreadable) == [7]
    steps = TrainSampler(plan_of(source), batch_size=50)
    ids = torch.cat([batch.ids for batch in executor.stream(steps, 0, 3)])
    assert 7 not in ids
    assert len(set(ids.tolist())) == 149


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_changed_its_size_is_not_used(name, folder, tmp_path):
    (tmp_path / "100.jpg").unlink()
    save_photos(tmp_path, 1, height=30, width=20)[0].rename(tmp_path / "100.jpg")
    save_photos(tmp_path, 1)
    executor = build(name, folder)
    for _ in executor.stream(TrainSampler(plan_of(folder), batch_size=40), 0, 6):
        pass
    assert set(executor.unreadable) == {CUT, GONE}
    assert "it has (20, 30) pixels and had (50, 40)" in executor.unreadable[CUT]
