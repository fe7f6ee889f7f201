"""The input on a real GPU: the CPU's pixels, intact next to a busy consumer, and without needless waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastssl_pipelines import (
    ArraySource,
    Batch,
    EvaluationSampler,
    Executor,
    ImageFolder,
    Source,
    TrainSampler,
    ViewSpec,
    available_executors,
    build_executor,
)
from fastssl_pipelines.executors.transfer import ALIGNED_BYTES, HOST_AHEAD, to_device
from tests.pipelines.photos import NORMALIZATION, photo, plan_of, save_photos

pytestmark = pytest.mark.gpu

STEPS = 40
SIZES = (48, 64)
VIEWS = tuple(ViewSpec(size=size, blur=0.5, solarize=0.2) for size in SIZES)
MEAN_LEVELS = 1.0  # Per image; the GPU's resize and pipeline, run on a CPU, were within 0.47 after augmentation
PIPELINES = [("resident", 2), ("torchvision", 0), ("torchvision", 2), ("dali", 2)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageFolder:
    root = tmp_path_factory.mktemp("images")
    save_photos(root, 96, height=90, width=110)
    return ImageFolder(root)


def build(name: str, source: Source, device: str, workers: int, **options) -> Executor:
    if reason := available_executors()[name]:
        pytest.skip(f"{name}: {reason}")
    return build_executor(name, source, device=device, workers=workers, **NORMALIZATION, **options)


def steps_of(source: Source, batch_size: int = 32) -> TrainSampler:
    return TrainSampler(plan_of(source, *VIEWS), batch_size=batch_size)


@pytest.fixture(scope="module")
def expected(images) -> list[Batch]:
    return list(build("torchvision", images, "cpu", 0).stream(steps_of(images), 0, STEPS))


def busy(milliseconds: float) -> None:
    """Keep the current stream busy, as training does."""
    torch.cuda._sleep(int(milliseconds * 1.5e6))  # Clock cycles at about 1.5 GHz


def assert_the_same(found: Batch, wanted: Batch) -> None:
    """`found` is already on the host."""
    assert found.step == wanted.step
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.labels, wanted.labels)
    for view, other in zip(found.views, wanted.views, strict=True):
        levels = (view - other).abs() * 255 * min(NORMALIZATION["std"])
        assert levels.mean((1, 2, 3)).max() < MEAN_LEVELS


def on_host(batch: Batch) -> Batch:
    views = tuple(view.cpu() for view in batch.views)
    return Batch(views=views, labels=batch.labels.cpu(), ids=batch.ids.cpu(), step=batch.step)


@pytest.mark.parametrize(("name", "workers"), PIPELINES)
def test_pixels_are_those_of_a_cpu(images, expected, name, workers):
    batches = build(name, images, "cuda", workers).stream(steps_of(images), 0, STEPS)
    for batch, wanted in zip(batches, expected, strict=True):
        assert {view.device.type for view in batch.views} == {"cuda"}
        assert_the_same(on_host(batch), wanted)


@pytest.mark.parametrize("consumer", ["slow", "fast"])
@pytest.mark.parametrize(("name", "workers"), PIPELINES)
def test_batches_are_intact_with_a_consumer_of_any_speed(images, expected, name, workers, consumer):
    """The consumer's stream copies each batch late, when the host has let go of it long ago: memory that the input
    uses again too early, and a batch that is read before it is finished, would show.
    """
    found = []
    for batch in build(name, images, "cuda", workers).stream(steps_of(images), 0, STEPS):
        if consumer == "slow":
            busy(10)
        found.append(
            Batch(
                views=tuple(view.clone() for view in batch.views),
                labels=batch.labels.clone(),
                ids=batch.ids.clone(),
                step=batch.step,
            )
        )
        del batch
    for batch, wanted in zip(found, expected, strict=True):
        assert_the_same(on_host(batch), wanted)


@pytest.mark.parametrize(("name", "workers"), PIPELINES)
def test_a_consumer_on_another_stream_gets_intact_batches(images, expected, name, workers):
    with torch.cuda.stream(torch.cuda.Stream()):
        for batch, wanted in zip(
            build(name, images, "cuda", workers).stream(steps_of(images), 0, STEPS), expected, strict=True
        ):
            assert_the_same(on_host(batch), wanted)


@pytest.mark.parametrize(("name", "workers"), PIPELINES)
def test_no_thread_waits_for_the_stream_that_trains(images, name, workers):
    """The input prepares batches while the consumer's stream has seconds of work queued."""
    executor = build(name, images, "cuda", workers, prefetch=HOST_AHEAD)
    stream = executor.stream(steps_of(images), 0, STEPS)
    next(stream)  # Compiles kernels and allocates memory
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        busy(3_000)
        idle = torch.cuda.Event()
        idle.record()
        given = [next(stream) for _ in range(HOST_AHEAD)]
        for batch in given:
            batch.ready.synchronize()
        assert not idle.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        stream.close()
        torch.cuda.synchronize()


@pytest.mark.parametrize(("name", "workers"), PIPELINES)
def test_two_streams_at_once_do_not_mix(images, expected, name, workers):
    """Like an evaluation during the prefetch of training."""
    executor, steps = build(name, images, "cuda", workers), steps_of(images)
    half = STEPS // 2
    pairs = zip(executor.stream(steps, 0, half), executor.stream(steps, half, STEPS), strict=True)
    for number, batches in enumerate(pairs):
        busy(2)
        for batch, wanted in zip(batches, (expected[number], expected[half + number]), strict=True):
            assert_the_same(on_host(batch), wanted)


@pytest.mark.parametrize(("name", "workers"), PIPELINES)
def test_memory_does_not_grow_with_the_length_of_a_stream(images, name, workers):
    executor, steps = build(name, images, "cuda", workers), steps_of(images)
    peaks = []
    for length in (10, 60):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in executor.stream(steps, 0, length):
            busy(3)
        torch.cuda.synchronize()
        # Includes freed memory that waits for the consumer's stream
        peaks.append(torch.cuda.memory_stats()["active_bytes.all.peak"])
    batch_bytes = 32 * 3 * sum(size**2 for size in SIZES) * 4
    assert peaks[1] <= peaks[0] + 2 * batch_bytes


def test_images_in_host_memory_give_the_same_batches(monkeypatch, images, expected, notes):
    monkeypatch.setattr("fastssl_pipelines.executors.resident._place", lambda needed_bytes, device: "cpu")
    executor = build("resident", images, "cuda", 2)
    assert any("host memory" in note for note in notes.take())
    for batch, wanted in zip(executor.stream(steps_of(images), 0, STEPS), expected, strict=True):
        busy(2)
        assert_the_same(on_host(batch), wanted)


def test_the_last_batch_of_an_evaluation_is_complete(images):
    steps = EvaluationSampler(plan_of(images, *VIEWS, shuffle=False), batch_size=36)
    wanted = list(build("torchvision", images, "cpu", 0).stream(steps, 0, len(steps)))
    for name, workers in PIPELINES:
        if available_executors()[name] is None:
            found = list(build(name, images, "cuda", workers).stream(steps, 0, len(steps)))
            assert [len(batch.ids) for batch in found] == [36, 36, 24]
            for batch, other in zip(found, wanted, strict=True):
                assert_the_same(on_host(batch), other)


def test_arrays_arrive_unchanged_even_if_modified_right_after():
    """The buffer of pinned memory is not reused before the copy from it is complete."""
    device = torch.device("cuda", torch.cuda.current_device())
    rng = np.random.default_rng(0)
    sent, found = [], []
    busy(200)
    for number in range(50):
        arrays = [rng.integers(0, 2**31, 1000 + number), rng.random(333) < 0.5, rng.random((7, 3)).astype(np.float32)]
        found.append(to_device(arrays, device))
        sent.append([array.copy() for array in arrays])
        for array in arrays:
            array[...] = 0
    for tensors, arrays in zip(found, sent, strict=True):
        for tensor, array in zip(tensors, arrays, strict=True):
            np.testing.assert_array_equal(tensor.cpu().numpy(), array)
            assert tensor.data_ptr() % ALIGNED_BYTES == 0


def test_small_resident_images_match_a_cpu_over_many_batches():
    images = np.stack([photo(32, 32, seed) for seed in range(512)])
    source = ArraySource("small", images, np.arange(512) % 4, ("a", "b", "c", "d"))
    steps = TrainSampler(plan_of(source, ViewSpec(size=32), ViewSpec(size=32)), batch_size=128)
    wanted = build("resident", source, "cpu", 0).stream(steps, 0, 200)
    for batch, other in zip(build("resident", source, "cuda", 2).stream(steps, 0, 200), wanted, strict=True):
        assert_the_same(on_host(batch), other)
