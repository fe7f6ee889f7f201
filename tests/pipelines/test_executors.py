"""Executors: the same plan gives the same batches, pixel by pixel within stated tolerances."""

from __future__ import annotations

import subprocess
import sys
import threading
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl_pipelines import (
    ArraySource,
    DataError,
    EvaluationSampler,
    Executor,
    ImageFolder,
    Source,
    TrainSampler,
    ViewSpec,
    available_executors,
    build_executor,
)
from fastssl_pipelines.errors import install_command
from fastssl_pipelines.executors import workers
from fastssl_pipelines.executors.base import THREADS_NAME, _automatic
from fastssl_pipelines.executors.resident import _crops_in_batches
from tests.pipelines.photos import ENLARGED, NORMALIZATION, REDUCED, photo, plan_of

NAMES = ("resident", "torchvision", "dali")
PLAIN = ViewSpec(size=24, jitter_probability=0, grayscale=0)


def build(name: str, source: Source, workers: int = 0, **options) -> Executor:
    if reason := available_executors()[name]:
        pytest.skip(f"{name}: {reason}")
    return build_executor(name, source, workers=workers, **NORMALIZATION, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ImageFolder:
    """24 JPEG and PNG files of two classes and different sizes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        path = root / f"class{number % 2}" / f"{number:02}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(photo(60 + 7 * number, 150 - 4 * number, number)).save(path)
    return ImageFolder(root)


@pytest.fixture(scope="module")
def small() -> ArraySource:
    images = np.stack([photo(32, 32, seed) for seed in range(40)])
    return ArraySource("small", images, np.arange(40) % 4, ("a", "b", "c", "d"))


def difference(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.int() - second.int()).abs()


@pytest.mark.parametrize("name", ["resident", "dali"])
@pytest.mark.parametrize("kind", ["folder", "small"])
@pytest.mark.parametrize("view", [ENLARGED, REDUCED, ViewSpec(size=24, center_crop=0.875)])
def test_pixels_are_those_of_torchvision(request, name, kind, view):
    source = request.getfixturevalue(kind)
    batch = plan_of(source, view).batch(0, 0, len(source))
    (crops,), (expected,) = build(name, source).crops(batch), build("torchvision", source).crops(batch)
    assert crops.dtype == torch.uint8
    assert crops.shape == expected.shape == (len(source), view.size, view.size, 3)
    levels = difference(crops, expected)
    # On a CPU, all executors resize like torchvision, and DALI decodes like PIL
    assert levels.max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_image_at_its_own_size_is_unchanged(name, small):
    batch = plan_of(small, ViewSpec(size=32, center_crop=1.0), shuffle=False).batch(0, 0, 40)
    (crops,) = build(name, small).crops(batch)
    np.testing.assert_array_equal(crops, np.stack([small.pixels(index) for index in range(40)]))


@pytest.mark.parametrize("name", ["resident", "dali"])
def test_every_format_is_decoded_the_same_way(name, tmp_path):
    image = Image.fromarray(photo(48, 48, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    for mode in ("L", "P", "1", "RGBA", "LA"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    for mode in ("L", "CMYK"):
        image.convert(mode).save(tmp_path / f"{mode}.jpg")
    Image.fromarray(np.asarray(image)[:, :, 0].astype(np.uint16) * 257).save(tmp_path / "16 bit.png")
    image.save(tmp_path / "progressive.jpg", progressive=True)
    image.save(tmp_path / "full color resolution.jpg", subsampling=0)
    image.save(tmp_path / "turned.jpg", exif=turned)
    source = ImageFolder(tmp_path)
    batch = plan_of(source, ViewSpec(size=48, center_crop=1.0)).batch(0, 0, len(source))
    (crops,), (expected,) = build(name, source).crops(batch), build("torchvision", source).crops(batch)
    assert torch.equal(crops, expected)


@pytest.mark.parametrize("view", [ENLARGED, REDUCED, ViewSpec(size=24, center_crop=0.875)])
def test_the_batched_resize_of_a_gpu_is_torchvisions_within_one_level(monkeypatch, folder, view):
    batch = plan_of(folder, view).batch(0, 0, 24)
    (expected,) = build("torchvision", folder).crops(batch)
    images = torch.zeros(24, folder.heights.max(), 3, folder.widths.max(), dtype=torch.uint8)
    for index in range(24):
        pixels = torch.from_numpy(folder.pixels(index))
        images[index, : pixels.shape[0], :, : pixels.shape[1]] = pixels.transpose(1, 2)
    (whole,) = _crops_in_batches(images, torch.device("cpu"), batch)
    levels = difference(whole, expected)
    assert levels.max() <= 1
    assert levels.float().mean() < 0.25
    monkeypatch.setattr("fastssl_pipelines.executors.resident._WORKING_SET_VALUES", 5 * images[0].numel())
    (in_parts,) = _crops_in_batches(images, torch.device("cpu"), batch)
    assert torch.equal(in_parts, whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_plan_applied(name, folder):
    steps = TrainSampler(plan_of(folder), batch_size=8)
    plan = steps[4]
    batch = build(name, folder, dtype=torch.bfloat16).batch(plan, 4)
    assert batch.step == 4
    assert batch.ids.tolist() == plan.ids.tolist()
    assert batch.labels.tolist() == folder.labels[plan.ids].tolist()
    assert [tuple(view.shape) for view in batch.views] == [(8, 3, 64, 64), (8, 3, 16, 16)]
    for view in batch.views:
        assert view.dtype == torch.bfloat16
        assert view.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resident", "dali"])
def test_batches_agree_between_executors(name, small):
    plan = plan_of(small, PLAIN).batch(0, 0, 40)
    batch, expected = build(name, small).batch(plan, 0), build("torchvision", small).batch(plan, 0)
    levels = (batch.views[0] - expected.views[0]).abs() * 0.225 * 255
    assert levels.mean() < 0.3
    assert plan.views[0].flip.any()
    assert not plan.views[0].flip.all()


@pytest.mark.parametrize("name", NAMES)
def test_flip_and_normalization_are_applied(name, small):
    view = ViewSpec(size=32, scale=(1, 1), ratio=(1, 1), jitter_probability=0, grayscale=0)
    plan = plan_of(small, view).batch(0, 0, 40)
    batch = build(name, small).batch(plan, 0)
    mean, std = (torch.tensor(NORMALIZATION[key])[:, None, None] for key in ("mean", "std"))
    for row, index in enumerate(plan.ids):
        image = torch.from_numpy(small.pixels(index)).permute(2, 0, 1)
        image = image.flip(2) if plan.views[0].flip[row] else image
        torch.testing.assert_close(batch.views[0][row], (image / 255 - mean) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_from_the_middle_equals_the_whole_across_epochs(name, small):
    steps = TrainSampler(plan_of(small), batch_size=16)
    assert steps.steps_per_epoch == 2
    whole = list(build(name, small).stream(steps, 0, 5))
    resumed = list(build(name, small).stream(steps, 3, 5))
    assert [batch.step for batch in whole] == [0, 1, 2, 3, 4]
    for one, other in zip(whole[3:], resumed, strict=True):
        assert one.step == other.step
        assert torch.equal(one.ids, other.ids)
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))
    assert sorted(torch.cat([whole[2].ids, whole[3].ids]).tolist()) != sorted(range(32))
    assert not any(torch.equal(one.ids, other.ids) for one, other in pairwise(whole))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_give_the_batch_of_one(name, small):
    executor = build(name, small)
    one = executor.batch(TrainSampler(plan_of(small), batch_size=32)[1], 1)
    ranks = [TrainSampler(plan_of(small), batch_size=16, rank=rank, world_size=2)[1] for rank in (0, 1)]
    two = [executor.batch(plan, 1) for plan in ranks]
    assert torch.equal(one.ids, torch.cat([batch.ids for batch in two]))
    for number in range(2):
        torch.testing.assert_close(one.views[number], torch.cat([batch.views[number] for batch in two]))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_ends_with_a_smaller_batch(name, folder):
    steps = EvaluationSampler(plan_of(folder, ViewSpec(size=32, center_crop=0.875), shuffle=False), batch_size=10)
    executor = build(name, folder)
    batches = list(executor.stream(steps, 0, len(steps)))
    assert [len(batch.labels) for batch in batches] == [10, 10, 4]
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(24))
    larger = EvaluationSampler(steps.plan, batch_size=24)
    (whole,) = executor.stream(larger, 0, 1)
    torch.testing.assert_close(whole.views[0], torch.cat([batch.views[0] for batch in batches]))


@pytest.mark.parametrize("name", NAMES)
def test_crops_stay_intact_while_later_ones_are_made(name, small):
    steps = TrainSampler(plan_of(small), batch_size=16)
    executor = build(name, small)
    kept = executor.crops(steps[0])
    copies = [crops.clone() for crops in kept]
    for step in range(1, 6):
        executor.crops(steps[step])
    assert all(torch.equal(crops, copy) for crops, copy in zip(kept, copies, strict=True))


@pytest.fixture
def broken(tmp_path) -> ImageFolder:
    """16 images; the file of index 11 has a good header and is cut."""
    for number in range(16):
        Image.fromarray(photo(40, 50, number)).save(tmp_path / f"{number:02}.jpg")
    content = (tmp_path / "11.jpg").read_bytes()
    (tmp_path / "11.jpg").write_bytes(content[: len(content) * 2 // 3])
    return ImageFolder(tmp_path)


@pytest.mark.parametrize("name", ["torchvision", "dali"])
def test_a_truncated_file_is_named_and_earlier_batches_still_arrive(name, broken):
    executor = build(name, broken)
    steps = EvaluationSampler(plan_of(broken, shuffle=False), batch_size=4)
    stream = executor.stream(steps, 0, len(steps))
    assert [next(stream).step, next(stream).step] == [0, 1]
    with pytest.raises(DataError, match=r"11\.jpg cannot be read .*--data\.root"):
        next(stream)
    assert executor.batch(steps[3], 3).ids.tolist() == [12, 13, 14, 15]


def test_a_truncated_file_is_named_when_the_resident_executor_starts(broken):
    with pytest.raises(DataError, match=r"11\.jpg cannot be read .*--data\.root"):
        build("resident", broken)


@pytest.mark.parametrize("name", ["torchvision", "resident"])
def test_worker_processes_give_the_same_batches(monkeypatch, name, small):
    monkeypatch.setattr("fastssl_pipelines.executors.resident._WORTH_PROCESSES", 3)
    steps = TrainSampler(plan_of(small), batch_size=16)
    in_process = list(build(name, small).stream(steps, 1, 15))
    # Keep all batches, to notice reused memory
    for one, other in zip(in_process, list(build(name, small, workers=2).stream(steps, 1, 15)), strict=True):
        assert (one.step, one.ids.tolist()) == (other.step, other.ids.tolist())
        assert all(torch.equal(a, b) for a, b in zip(one.views, other.views, strict=True))


def test_a_worker_process_gives_the_same_error(broken):
    steps = EvaluationSampler(plan_of(broken, shuffle=False), batch_size=4)
    with pytest.raises(DataError, match=r"11\.jpg cannot be read") as raised:
        list(build("torchvision", broken, workers=1).stream(steps, 0, len(steps)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "workers"), [("resident", 0), ("torchvision", 0), ("torchvision", 1), ("dali", 1)])
def test_a_stream_stops_with_its_consumer(name, workers, small):
    before = threading.enumerate()  # Some tests leave stuck threads behind on purpose
    executor = build(name, small, workers=workers)
    stream = executor.stream(TrainSampler(plan_of(small), batch_size=4), 0, 10**9)
    assert next(stream).step == 0
    stream.close()
    assert not [
        thread for thread in set(threading.enumerate()) - set(before) if thread.name.startswith(f"{THREADS_NAME}input")
    ]


def test_a_stream_prepares_no_more_than_its_prefetch(small):
    asked = []

    class Watched(TrainSampler):
        def at(self, step, unreadable=None):
            asked.append(step)
            return super().at(step, unreadable)

    stream = build("resident", small, prefetch=1).stream(Watched(plan_of(small), batch_size=4), 0, 100)
    next(stream)
    next(stream)
    stream.close()
    assert asked in ([0, 1], [0, 1, 2])


EXIT_WITH_OPEN_STREAM = """
import sys
import numpy as np
from fastssl_pipelines import ArraySource, SamplePlan, TrainSampler, ViewSpec, build_executor

if __name__ == "__main__":
    assert not {"torchvision", "nvidia.dali", "fastssl"} & set(sys.modules), "imported without need"
    source = ArraySource("s", np.zeros((8, 9, 9, 3), np.uint8), np.zeros(8, int), ("a",))
    plan = SamplePlan(widths=source.widths, heights=source.heights, labels=source.labels,
                      views=[ViewSpec(size=8)], seed=0)
    executor = build_executor("torchvision", source, mean=(0, 0, 0), std=(1, 1, 1), workers=1)
    stream = executor.stream(TrainSampler(plan, batch_size=2), 0, 10**9)
    print(next(stream).step)
"""


@pytest.mark.slow
def test_the_interpreter_exits_with_an_open_stream(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(EXIT_WITH_OPEN_STREAM)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_misspelled_pipeline_is_refused(small):
    with pytest.raises(DataError, match=r"jax .*--data\.pipeline is auto, dali, torchvision, resident"):
        build_executor("jax", small, **NORMALIZATION)


def test_a_missing_package_is_named(monkeypatch, small):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert install_command("dali") in available_executors()["dali"]
    with pytest.raises(DataError, match=r"dali does not work here: it is not installed: pip .*--data\.pipeline"):
        build_executor("dali", small, **NORMALIZATION)


def test_auto_takes_resident_for_small_data_then_dali_on_a_gpu_then_torchvision(monkeypatch, small):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    gib = 40 * 32 * 32 * 3 / 2**30
    assert _automatic(small, cpu, gib) == _automatic(small, gpu, gib) == "resident"
    assert type(build_executor("auto", small, **NORMALIZATION)).__name__ == "ResidentExecutor"
    gib *= 0.99
    monkeypatch.setitem(sys.modules, "nvidia.dali", ModuleType("nvidia.dali"))
    assert _automatic(small, gpu, gib) == "dali"
    assert _automatic(small, cpu, gib) == "torchvision"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert _automatic(small, gpu, gib) == "torchvision"


def test_a_negative_number_of_workers_is_refused(small):
    with pytest.raises(ValueError, match=r"--data\.workers"):
        build_executor("resident", small, workers=-1, **NORMALIZATION)


@pytest.mark.parametrize(("room", "taken"), [(7, 3), (6, 2), (4, 1), (2, 0)])
def test_the_shared_memory_limits_the_number_of_workers(monkeypatch, notes, folder, room, taken):
    """Each has two batches in progress, and one more is being copied."""
    plan = plan_of(folder, REDUCED).batch(0, 0, 8)
    free_bytes = 2 * room * 8 * 16 * 16 * 3  # Half of it may be used
    monkeypatch.setattr(workers.os, "statvfs", lambda path: SimpleNamespace(f_bavail=free_bytes, f_frsize=1))
    asked = []
    monkeypatch.setattr(workers, "_views_of_processes", lambda *given: asked.append((len(given[2]), given[3])) or ())
    views = workers.views_of([plan], lambda plan: (), None, workers=3, own_memory=False, processes=[], turns=None)
    assert len(list(views)) == (taken == 0)
    assert asked == ([(2 * taken + 1, taken)] if taken else [])
    who = {3: [], 0: ["in this process, by one thread"]}.get(taken, [f"by {taken} of 3 workers"])
    assert [sentence.partition("so images are decoded ")[2] for sentence in notes.take()] == [
        f"{words}; lower --data.workers" for words in who
    ]
