"""The DALI executor: the pipeline of a GPU, regions, and files that only Pillow reads."""

from __future__ import annotations

import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl_pipelines import DataError, ImageFolder, TrainSampler, ViewSpec, build_executor
from tests.pipelines import fake_cuda
from tests.pipelines.photos import ENLARGED, NORMALIZATION, REDUCED, photo, plan_of, save_photos

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from fastssl_pipelines.executors import dali
from fastssl_pipelines.executors.dali import DaliExecutor
from fastssl_pipelines.executors.dali_graph import Decoder, region_of, within


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ImageFolder:
    """24 JPEG and PNG files of different sizes."""
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        path = root / f"{number:02}.{'png' if number % 3 else 'jpg'}"
        Image.fromarray(photo(60 + 7 * number, 150 - 4 * number, number)).save(path)
    return ImageFolder(root)


def encoded(source: ImageFolder, ids) -> list[np.ndarray]:
    return [np.frombuffer(source.encoded(int(index)), np.uint8) for index in ids]


@pytest.mark.parametrize("decode", ["cpu", "cpu-region"])
@pytest.mark.parametrize("view", [ENLARGED, REDUCED, ViewSpec(size=24, center_crop=0.875)])
def test_gpu_crops_are_within_one_level_of_torchvisions_except_at_the_border(folder, view, decode):
    plan = plan_of(folder, view, view).batch(0, 0, 24)
    decoder = Decoder((view.size, view.size), 24, threads=2, device=None, decode=decode)
    outputs = decoder.run(encoded(folder, plan.ids), [each.boxes for each in plan.views])
    expected = build_executor("torchvision", folder, workers=0, **NORMALIZATION).crops(plan)
    for output, wanted in zip(outputs, expected, strict=True):
        levels = (torch.from_dlpack(output.as_tensor()).int() - wanted.int()).abs()
        margin = view.size // 8
        assert levels[:, margin:-margin, margin:-margin].max() <= 1
        # For a downscaled box, DALI repeats its border pixel and torchvision narrows the filter
        assert levels.max() <= 12
        assert levels.float().mean() < 0.4


def test_a_region_holds_every_box_and_no_more():
    boxes = [np.array([[5, 6, 10, 20]], np.int32), np.array([[8, 2, 30, 10]], np.int32)]
    region = region_of(boxes)
    assert region.tolist() == [[5, 2, 33, 24]]
    assert [within(region, box).tolist() for box in boxes] == [[[0, 4, 10, 20]], [[3, 0, 30, 10]]]


def test_decoding_a_region_changes_no_pixel(folder):
    plan = plan_of(folder).batch(0, 0, 24)
    whole, region = (
        build_executor("dali", folder, decode=decode, workers=0, **NORMALIZATION).crops(plan)
        for decode in ("cpu", "cpu-region")
    )
    assert all(torch.equal(one, other) for one, other in zip(whole, region, strict=True))


def test_a_file_that_only_pillow_reads_is_used(tmp_path):
    paths = save_photos(tmp_path, 40)
    Image.open(paths[5]).save(tmp_path / "005.png")
    paths[5].unlink()
    content = (tmp_path / "005.png").read_bytes()
    (tmp_path / "005.png").write_bytes(content[:-6])  # Without its end marker
    source = ImageFolder(tmp_path)
    steps = TrainSampler(plan_of(source), batch_size=20)
    executor = build_executor("dali", source, workers=2, **NORMALIZATION)
    for _ in executor.stream(steps, 0, 4):
        pass
    assert executor.unreadable == {}
    assert_the_crops_of_torchvision(executor)


def test_a_file_that_only_dali_refuses_is_used(monkeypatch, tmp_path):
    paths = save_photos(tmp_path, 40)
    source = ImageFolder(tmp_path)
    refused = paths[5].read_bytes()
    run = Decoder.run

    def choosy(self, encoded, boxes):
        if any(file.tobytes() == refused for file in encoded):
            raise RuntimeError("something in the batch is wrong")
        return run(self, encoded, boxes)

    monkeypatch.setattr(Decoder, "run", choosy)
    executor = build_executor("dali", source, workers=2, **NORMALIZATION)
    assert_the_crops_of_torchvision(executor)
    assert executor.unreadable == {}


def test_an_error_unrelated_to_a_file_reaches_the_user(monkeypatch, folder):
    run = Decoder.run

    def broken(self, encoded, boxes):
        if boxes:
            raise RuntimeError("out of memory")
        return run(self, encoded, boxes)

    monkeypatch.setattr(Decoder, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        build_executor("dali", folder, **NORMALIZATION).crops(plan_of(folder).batch(0, 0, 8))


def assert_the_crops_of_torchvision(executor):
    plan = plan_of(executor.source).batch(0, 0, len(executor.source))
    expected = build_executor("torchvision", executor.source, workers=0, **NORMALIZATION).crops(plan)
    assert all(torch.equal(one, other) for one, other in zip(executor.crops(plan), expected, strict=True))


def test_two_streams_at_once_do_not_mix(folder):
    steps = TrainSampler(plan_of(folder), batch_size=8)
    executor = build_executor("dali", folder, workers=1, **NORMALIZATION)
    expected = {step: executor.batch(steps[step], step) for step in range(6)}
    for one, other in zip(executor.stream(steps, 0, 3), executor.stream(steps, 3, 6), strict=True):
        for batch in (one, other):
            assert batch.ids.tolist() == expected[batch.step].ids.tolist()
            assert torch.equal(batch.views[0], expected[batch.step].views[0])


def test_auto_chooses_the_fastest_decoder_and_logs_it(monkeypatch, folder, notes):
    seconds = {"gpu": 0.02, "gpu-region": 0.004, "cpu": 0.03, "cpu-region": 0.03}
    clock = [100.0]

    class Timed:
        def __init__(self, decode):
            self.decode = decode

        def run(self, encoded, boxes):
            clock[0] += seconds[self.decode]

    executor = build_executor("dali", folder, workers=3, **NORMALIZATION)
    monkeypatch.setattr(dali.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(executor, "_new_decoder", lambda sizes, batch_size, decode: Timed(decode))
    plan = plan_of(folder).batch(0, 0, 24)
    assert executor._faster_way((64, 16), plan, []) == "gpu-region"
    (note,) = notes.take()
    assert "auto takes gpu-region; images/s with 3 threads: gpu 1200, gpu-region 6000, cpu 800, cpu-region 800" in note


def test_decoding_on_a_missing_gpu_is_refused(folder):
    with pytest.raises(DataError, match=r"--data\.decode gpu was given with device cpu"):
        build_executor("dali", folder, decode="gpu", **NORMALIZATION)


def test_files_that_make_dali_crash_do_not_reach_it(tmp_path):
    paths = save_photos(tmp_path, 400)
    source = ImageFolder(tmp_path)
    content = paths[0].read_bytes()
    for number, rest in zip((100, 200, 300), (b"", b"hello" * 50, content[:4] + b"hello" * 500), strict=True):
        paths[number].write_bytes(rest)
    executor = build_executor("dali", source, workers=2, **NORMALIZATION)
    steps = TrainSampler(plan_of(source), batch_size=100)
    for _ in executor.stream(steps, 0, 8):
        pass
    assert set(executor.unreadable) == {100, 200, 300}


class SlowDecoder:
    """Decodes nothing; `at_once`: other runs in progress at each run, `decodes`: decoder of each instance."""

    at_once: list[int]
    decodes: list[str]
    running = 0

    def __init__(self, sizes, batch_size, *, decode, **_):
        self.sizes, self.batch_size = sizes, batch_size
        self.decodes.append(decode)

    def run(self, encoded, boxes):
        self.at_once.append(type(self).running)
        type(self).running += 1
        time.sleep(0.02)
        type(self).running -= 1
        return [torch.zeros(len(encoded), size, size, 3, dtype=torch.uint8) for size in self.sizes]


@pytest.fixture
def slow(monkeypatch, folder):
    """Executor for a fake GPU, and the class of its decoders."""
    fake_cuda.install(monkeypatch)
    decoder = type("SlowDecoder", (SlowDecoder,), {"at_once": [], "decodes": []})
    monkeypatch.setattr(dali, "Decoder", decoder)
    monkeypatch.setattr(dali, "_MEASURED_S", 0.0)
    monkeypatch.setattr(DaliExecutor, "_crops", lambda self, outputs, plan: tuple(outputs))
    return build_executor("dali", folder, device=fake_cuda.DEVICE, workers=2, **NORMALIZATION), decoder


def test_auto_measures_once_while_nothing_else_is_decoded(slow, folder, notes):
    executor, decoder = slow
    steps = TrainSampler(plan_of(folder), batch_size=8)
    with ThreadPoolExecutor(2) as consumers:  # Like training and evaluation at the same time
        batches = consumers.map(lambda first: len(list(executor.stream(steps, first, first + 4))), (0, 4))
        assert list(batches) == [4, 4]
    assert decoder.decodes[:4] == list(dali.DECODES)
    assert set(decoder.decodes[4:]) == {executor._decode}
    assert decoder.at_once[: 2 * len(dali.DECODES)] == [0] * 2 * len(dali.DECODES)
    assert max(decoder.at_once) > 0
    (note,) = notes.take()
    assert "auto takes" in note


def test_auto_measures_before_other_batches_are_read(slow, folder, monkeypatch):
    executor, _ = slow
    read, decode_then = executor._encoded, []

    def watched(ids):
        decode_then.append(executor._decode)
        return read(ids)

    monkeypatch.setattr(executor, "_encoded", watched)
    assert len(list(executor.stream(TrainSampler(plan_of(folder), batch_size=8), 0, 6))) == 6
    assert decode_then.count("auto") == 1
    assert len(decode_then) == 7  # The first batch is decoded twice


def test_a_decoder_is_used_by_one_thread_at_a_time(slow, folder):
    class SlowList(list):
        """Switches threads just before a pop."""

        def pop(self, at):
            time.sleep(0.02)
            return super().pop(at)

    executor, decoder = slow
    executor._decode, plan = "gpu", plan_of(folder).batch(0, 0, 8)
    executor.crops(plan)
    executor._idle = SlowList(executor._idle)
    with ThreadPoolExecutor(2) as threads:
        taken = list(threads.map(lambda _: executor._decoder(plan, []), range(2)))
    assert taken[0] is not taken[1]
    assert len(decoder.decodes) == 2
    assert executor._idle == []


def test_inputs_are_kept_while_dali_may_read_them(monkeypatch, folder):
    """DALI makes no copies, so the decoder must keep the arrays that `run` makes alive."""
    decoder = Decoder((24,), 8, threads=1, device=None, decode="cpu-region")
    plan = plan_of(folder, REDUCED).batch(0, 0, 8)
    fed = []
    run = decoder._pipeline.run

    def watched(**inputs):
        fed.extend(weakref.ref(array) for array in inputs.values() if isinstance(array, np.ndarray))
        return run(**inputs)

    monkeypatch.setattr(decoder._pipeline, "run", watched)
    files = encoded(folder, plan.ids)
    decoder.run(files, [view.boxes for view in plan.views])
    assert len(fed) == 4
    assert all(array() is not None for array in fed)
    fed_before = fed[:]
    decoder.run(files, [view.boxes for view in plan.views])
    assert all(array() is None for array in fed_before)


def test_feeding_copies_nothing(monkeypatch, folder):
    """Copying 256 files of 95 KB took 9 ms and more, during which no other Python thread could run."""
    decoder = Decoder((24,), 8, threads=1, device=None, decode="cpu")
    plan = plan_of(folder, REDUCED).batch(0, 0, 8)
    files, (boxes,) = encoded(folder, plan.ids), (view.boxes for view in plan.views)
    in_the_corner = boxes.copy()
    in_the_corner[:, :2] = 0
    schedule = decoder._pipeline.schedule_run

    def changed_after_it_was_fed():
        decoder._fed["view_0_start"][:] = 0
        schedule()

    (expected,) = decoder.run(files, [in_the_corner])
    expected = torch.from_dlpack(expected.as_tensor()).clone()
    monkeypatch.setattr(decoder._pipeline, "schedule_run", changed_after_it_was_fed)
    (found,) = decoder.run(files, [boxes])
    assert boxes[:, :2].any()
    assert torch.equal(torch.from_dlpack(found.as_tensor()), expected)
