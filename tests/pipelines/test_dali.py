"""What is DALI's alone: the graph that a GPU runs, regions, and files that only Pillow reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl_pipelines import DataError, ImageFolder, TrainingSteps, ViewSpec, build_executor
from tests.pipelines.photos import ENLARGED, NORMALISATION, REDUCED, photo, plan_of, save_photos

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from fastssl_pipelines import dali
from fastssl_pipelines.dali_graph import Decoder, region_of, within


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ImageFolder:
    """24 JPEG and PNG files, no two of one size."""
    root = tmp_path_factory.mktemp("images")
    for number in range(24):
        path = root / f"{number:02}.{'png' if number % 3 else 'jpg'}"
        Image.fromarray(photo(60 + 7 * number, 150 - 4 * number, number)).save(path)
    return ImageFolder(root)


def encoded(source: ImageFolder, ids) -> list[np.ndarray]:
    return [np.frombuffer(source.encoded(int(index)), np.uint8) for index in ids]


@pytest.mark.parametrize("decode", ["cpu", "cpu-region"])
@pytest.mark.parametrize("view", [ENLARGED, REDUCED, ViewSpec(size=24, centre=0.875)])
def test_the_cut_and_resize_of_a_gpu_are_torchvisions_within_one_level_but_for_the_border(folder, view, decode):
    plan = plan_of(folder, view, view).batch(0, 0, 24)
    decoder = Decoder((view.size, view.size), 24, threads=2, device=None, decode=decode)
    outputs = decoder.run(encoded(folder, plan.ids), [each.boxes for each in plan.views])
    expected = build_executor("torchvision", folder, workers=0, **NORMALISATION).crops(plan)
    for output, wanted in zip(outputs, expected, strict=True):
        levels = (torch.from_dlpack(output.as_tensor()).int() - wanted.int()).abs()
        margin = view.size // 8
        assert levels[:, margin:-margin, margin:-margin].max() <= 1
        # where a box is made smaller, DALI repeats its border pixel and torchvision narrows the filter
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
        build_executor("dali", folder, decode=decode, workers=0, **NORMALISATION).crops(plan)
        for decode in ("cpu", "cpu-region")
    )
    assert all(torch.equal(one, other) for one, other in zip(whole, region, strict=True))


def test_a_file_that_only_pillow_reads_is_used(tmp_path):
    paths = save_photos(tmp_path, 40)
    Image.open(paths[5]).save(tmp_path / "005.png")
    paths[5].unlink()
    content = (tmp_path / "005.png").read_bytes()
    (tmp_path / "005.png").write_bytes(content[:-6])  # its end mark is cut
    source = ImageFolder(tmp_path)
    steps = TrainingSteps(plan_of(source), batch_size=20)
    executor = build_executor("dali", source, workers=2, **NORMALISATION)
    for _ in executor.stream(steps, 0, 4):
        pass
    assert executor.unreadable == {}
    assert_the_crops_of_torchvision(executor)


def test_a_file_that_dali_alone_refuses_is_used(monkeypatch, tmp_path):
    paths = save_photos(tmp_path, 40)
    source = ImageFolder(tmp_path)
    refused = paths[5].read_bytes()
    run = Decoder.run

    def choosy(self, encoded, boxes):
        if any(file.tobytes() == refused for file in encoded):
            raise RuntimeError("something in the batch is wrong")
        return run(self, encoded, boxes)

    monkeypatch.setattr(Decoder, "run", choosy)
    executor = build_executor("dali", source, workers=2, **NORMALISATION)
    assert_the_crops_of_torchvision(executor)
    assert executor.unreadable == {}


def test_an_error_that_is_about_no_file_reaches_the_user(monkeypatch, folder):
    run = Decoder.run

    def broken(self, encoded, boxes):
        if boxes:
            raise RuntimeError("out of memory")
        return run(self, encoded, boxes)

    monkeypatch.setattr(Decoder, "run", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        build_executor("dali", folder, **NORMALISATION).crops(plan_of(folder).batch(0, 0, 8))


def assert_the_crops_of_torchvision(executor):
    plan = plan_of(executor.source).batch(0, 0, len(executor.source))
    expected = build_executor("torchvision", executor.source, workers=0, **NORMALISATION).crops(plan)
    assert all(torch.equal(one, other) for one, other in zip(executor.crops(plan), expected, strict=True))


def test_two_streams_at_once_do_not_mix(folder):
    steps = TrainingSteps(plan_of(folder), batch_size=8)
    executor = build_executor("dali", folder, workers=1, **NORMALISATION)
    expected = {step: executor.batch(steps[step], step) for step in range(6)}
    for one, other in zip(executor.stream(steps, 0, 3), executor.stream(steps, 3, 6), strict=True):
        for batch in (one, other):
            assert batch.ids.tolist() == expected[batch.step].ids.tolist()
            assert torch.equal(batch.views[0], expected[batch.step].views[0])


def test_auto_takes_the_fastest_way_and_says_so(monkeypatch, folder):
    seconds = {"gpu": 0.02, "gpu-region": 0.004, "cpu": 0.03, "cpu-region": 0.03}
    clock = [100.0]

    class Timed:
        def __init__(self, decode):
            self.decode = decode

        def run(self, encoded, boxes):
            clock[0] += seconds[self.decode]

    executor = build_executor("dali", folder, workers=3, **NORMALISATION)
    monkeypatch.setattr(dali.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(executor, "_new_decoder", lambda sizes, batch_size, decode: Timed(decode))
    plan = plan_of(folder).batch(0, 0, 24)
    assert executor._faster_way((64, 16), plan, []) == "gpu-region"
    (note,) = executor.notes
    assert "auto takes gpu-region; images/s with 3 threads: gpu 1200, gpu-region 6000, cpu 800, cpu-region 800" in note


def test_decoding_on_a_gpu_that_is_not_there_is_refused(folder):
    with pytest.raises(DataError, match=r"--data\.decode gpu was given with device cpu"):
        build_executor("dali", folder, decode="gpu", **NORMALISATION)


def test_files_that_make_dali_crash_do_not_reach_it(tmp_path):
    paths = save_photos(tmp_path, 400)
    source = ImageFolder(tmp_path)
    content = paths[0].read_bytes()
    for number, rest in zip((100, 200, 300), (b"", b"hello" * 50, content[:4] + b"hello" * 500), strict=True):
        paths[number].write_bytes(rest)
    executor = build_executor("dali", source, workers=2, **NORMALISATION)
    steps = TrainingSteps(plan_of(source), batch_size=100)
    for _ in executor.stream(steps, 0, 8):
        pass
    assert set(executor.unreadable) == {100, 200, 300}
