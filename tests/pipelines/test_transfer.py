"""From the input's CUDA stream to the one that trains: no wait is too long and no memory is reused too early.

The GPU is a fake that records the operations on its streams; test_gpu_input.py uses a real one.
"""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl_kernels import use_backend
from fastssl_pipelines import ArraySource, Batch, Executor, TrainSampler, ViewSpec, available_executors, build_executor
from fastssl_pipelines.executors import pixels, resident
from fastssl_pipelines.executors.transfer import ALIGNED_BYTES, HOST_AHEAD, TURN_S, to_device
from tests.pipelines import fake_cuda
from tests.pipelines.photos import NORMALIZATION, photo, plan_of

BATCHES = 9
COPIES_AT_MOST = 4  # Per batch: pixels in host memory, ids and boxes, values of all views, labels and ids


@pytest.fixture
def cuda(monkeypatch) -> fake_cuda.FakeCuda:
    return fake_cuda.install(monkeypatch)


@pytest.fixture(scope="module")
def source() -> ArraySource:
    images = np.stack([photo(32, 32, seed) for seed in range(40)])
    return ArraySource("small", images, np.arange(40) % 4, ("a", "b", "c", "d"))


def steps_of(source) -> TrainSampler:
    views = (ViewSpec(size=16, blur=0.5), ViewSpec(size=24))
    return TrainSampler(plan_of(source, *views), batch_size=8)


def executor_on(device: torch.device | str, name: str, source, monkeypatch, **options) -> Executor:
    if reason := available_executors()[name]:
        pytest.skip(f"{name}: {reason}")
    if name == "dali" and torch.device(device).type == "cuda":
        decodes_with_torchvision(source, monkeypatch)
        options["decode"] = "gpu"
    return build_executor(name, source, device=device, **NORMALIZATION, **options)


def decodes_with_torchvision(source, monkeypatch) -> None:
    """Replaces DALI's decoder, which needs a real GPU: returns torchvision's crops of the plan."""
    from fastssl_pipelines.executors import dali

    crops = build_executor("torchvision", source, workers=0, **NORMALIZATION).crops
    monkeypatch.setattr(dali.DaliExecutor, "_crops", lambda self, outputs, plan: crops(plan))
    monkeypatch.setattr(dali, "Decoder", lambda *_, **__: SimpleNamespace(sizes=(16, 24), batch_size=8, run=list_of))


def list_of(*arguments: object) -> list[object]:
    return [*arguments]


PIPELINES = [("resident", 1), ("torchvision", 0), ("torchvision", 2), ("dali", 2)]


@pytest.mark.parametrize(("name", "workers"), PIPELINES)
def test_batches_are_made_on_a_separate_stream_and_handed_over_by_events(monkeypatch, cuda, source, name, workers):
    steps = steps_of(source)
    executor = executor_on(fake_cuda.DEVICE, name, source, monkeypatch, workers=workers)
    cuda.consumer.log.clear()
    taken = []
    for batch in executor.stream(steps, 0, BATCHES):
        # The consumer's stream waits before anything can be queued on it
        assert cuda.consumer.log[-1] == ("wait", batch.ready)
        kept = cuda.kept[-4:]
        tensors = (*batch.views, batch.labels, batch.ids)
        assert [memory for memory, _, _ in kept] == [each.untyped_storage().data_ptr() for each in tensors]
        assert {(stream, thread) for _, stream, thread in kept} == {(cuda.consumer, threading.current_thread().name)}
        taken.append(batch)

    (own,) = cuda.streams
    assert {batch.ready.stream for batch in taken} == {own}
    assert ("copy", True) not in own.log
    assert {kind for kind, *_ in cuda.consumer.log} == {"wait", "record"}  # The input queues nothing there
    assert 0 < own.log.count(("copy", False)) <= COPIES_AT_MOST * BATCHES
    assert own.log[-1] == ("record", taken[-1].ready)  # After everything queued for the batch


@pytest.mark.parametrize(("name", "workers"), PIPELINES)
def test_batches_for_a_gpu_are_those_for_a_cpu(monkeypatch, cuda, source, name, workers):
    """All batches are kept, to notice reused memory."""
    steps = steps_of(source)
    expected = list(executor_on("cpu", "torchvision", source, monkeypatch, workers=0).stream(steps, 0, BATCHES))
    found = list(executor_on(fake_cuda.DEVICE, name, source, monkeypatch, workers=workers).stream(steps, 0, BATCHES))
    one_level = 1.01 / (255 * min(NORMALIZATION["std"]))
    for one, other in zip(found, expected, strict=True):
        assert one.step == other.step
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.labels, other.labels)
        for view, wanted in zip(one.views, other.views, strict=True):
            if (
                name == "resident"
            ):  # Its resize uses matrix products, and color augmentation amplifies a difference of one level
                assert (view - wanted).abs().mean() < one_level
            else:
                assert torch.equal(view, wanted)


def test_a_single_batch_is_copied_from_pinned_memory_on_the_current_stream(monkeypatch, cuda, source):
    executor = executor_on(fake_cuda.DEVICE, "torchvision", source, monkeypatch, workers=0)
    batch = executor.batch(steps_of(source)[0], 0)
    assert cuda.consumer.log == [("copy", False)] * 3  # Pixels, values of the views, labels and ids
    assert batch.ready is None


def test_the_host_stays_few_batches_ahead_of_the_device(monkeypatch, cuda, source):
    """It waits only for its own stream and the oldest batch, never for the input's stream."""
    waited = []
    monkeypatch.setattr(fake_cuda.Event, "synchronize", lambda event: waited.append(event))
    stream = executor_on(fake_cuda.DEVICE, "resident", source, monkeypatch).stream(steps_of(source), 0, BATCHES)
    for given_before, _ in enumerate(stream):
        assert len(waited) == max(0, given_before - HOST_AHEAD)
    done = [event for kind, event in cuda.consumer.log if kind == "record"]
    assert waited == done[: BATCHES - HOST_AHEAD]


def test_dali_writes_over_crops_when_the_input_has_read_them(monkeypatch, cuda, source):
    """It waits for the stream that augments, not for the one that trains."""
    executor = executor_on(fake_cuda.DEVICE, "dali", source, monkeypatch, workers=2)
    waited = []
    monkeypatch.setattr(fake_cuda.Event, "synchronize", lambda event: waited.append(event))
    for _ in executor.stream(steps_of(source), 0, BATCHES):
        pass
    (own,) = cuda.streams
    assert {event.stream for event in waited} == {own, cuda.consumer}
    assert [event.stream for event in waited].count(own) == BATCHES  # The last one at the end


def test_two_streams_of_an_executor_share_its_cuda_stream(monkeypatch, cuda, source):
    """The allocator keeps memory per CUDA stream, so a new stream for each evaluation would need more and more."""
    executor = executor_on(fake_cuda.DEVICE, "resident", source, monkeypatch)
    streams = {batch.ready.stream for _ in range(2) for batch in executor.stream(steps_of(source), 0, 2)}
    assert streams == set(cuda.streams)
    assert len(streams) == 1


def test_the_switch_interval_is_short_with_a_gpu_only(monkeypatch, cuda, source):
    monkeypatch.setattr(sys, "getswitchinterval", lambda: 5e-3)
    next(executor_on("cpu", "resident", source, monkeypatch).stream(steps_of(source), 0, 1))
    assert cuda.turns_s == []
    next(executor_on(fake_cuda.DEVICE, "resident", source, monkeypatch).stream(steps_of(source), 0, 1))
    assert cuda.turns_s == [TURN_S]


def test_taking_a_single_batch_does_nothing():
    tensor = torch.zeros(2)
    Batch(views=(tensor,), labels=tensor, ids=tensor, step=0).take()


ARRAYS = (
    np.arange(5, dtype=np.int64),
    np.array([True, False, True]),
    np.linspace(0, 1, 7, dtype=np.float32),
    np.arange(12, dtype=np.int32).reshape(3, 4)[:, 1:3],
    np.arange(3, dtype=np.uint8),
    np.arange(24, dtype=np.int64).reshape(6, 4),
)


def test_many_arrays_are_moved_to_a_device_in_one_copy(cuda):
    tensors = to_device([*ARRAYS, torch.arange(6)], fake_cuda.DEVICE)
    for tensor, array in zip(tensors, (*ARRAYS, np.arange(6)), strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.storage_offset() * tensor.element_size() % ALIGNED_BYTES == 0
        assert tensor.is_contiguous()
    assert cuda.consumer.log == [("copy", False)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_nothing_is_copied_for_a_cpu():
    tensors = to_device(ARRAYS, torch.device("cpu"))
    assert all(np.shares_memory(tensor.numpy(), array) for tensor, array in zip(tensors, ARRAYS, strict=True))


class Launches(TorchDispatchMode):
    """Counts kernel launches: all operations except views and empty allocations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func is not torch.ops.aten.empty.memory_format:
            self.count += all(given.alias_info is None or given.alias_info.is_write for given in func._schema.returns)
        return func(*args, **(kwargs or {}))


def test_views_of_resident_images_need_no_synchronization_and_few_launches(monkeypatch, source):
    """With fake tensors: reading a value, or a shape that depends on values, raises an error."""

    def on_the_device(arrays, device):
        return [torch.empty(array.shape, dtype=torch.from_numpy(array).dtype, device=device) for array in arrays]

    for module in (resident, pixels):
        monkeypatch.setattr(module, "to_device", on_the_device)
    plan = steps_of(source)[0]
    augment = pixels.Augmentation(**NORMALIZATION, device=fake_cuda.DEVICE, dtype=torch.bfloat16)
    with FakeTensorMode(), use_backend("blockwise"):
        images = torch.empty(40, 32, 3, 32, dtype=torch.uint8, device=fake_cuda.DEVICE)
        with Launches() as launches:
            crops = resident._crops_in_batches(images, fake_cuda.DEVICE, plan)
        views = augment(plan, crops)
    assert [tuple(view.shape) for view in views] == [(8, 3, 16, 16), (8, 3, 24, 24)]
    assert {view.device for view in views} == {fake_cuda.DEVICE}
    assert launches.count <= 50
