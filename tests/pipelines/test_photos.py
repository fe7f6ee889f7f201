from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.sources.open import open_source
from fastssl_pipelines.synthetic import photos as photographs
from fastssl_pipelines.synthetic.photos import photograph, write_photographs
from fastssl_pipelines.synthetic.shapes import CLASSES


@pytest.fixture(scope="module")
def files():
    return [photograph(index, seed=0) for index in range(48)]


def spectrum_slope(gray: np.ndarray) -> float:
    """Exponent of a power law fit to the amplitudes of the central square, from 3 waves to 0.35 per pixel."""
    side = min(gray.shape)
    top, left = (length - side for length in gray.shape)
    square = gray[top // 2 :, left // 2 :][:side, :side]
    window = np.hanning(side)
    amplitude = np.abs(np.fft.fft2((square - square.mean()) * window * window[:, None]))
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side))
    edges = np.geomspace(3 / side, 0.35, 12)
    ring = np.digitize(frequency, edges)
    mean = [np.sqrt((amplitude[ring == number] ** 2).mean()) for number in range(1, len(edges))]
    return np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(mean), 1)[0]


def test_files_are_as_large_as_those_of_imagenet(files):
    assert 100_000 < np.mean([len(file) for file in files]) < 120_000


def test_sizes_and_sampling_are_those_of_imagenet(files):
    images = [Image.open(io.BytesIO(file)) for file in files]
    sizes = [image.size for image in images]
    common = [(500, 375), (375, 500)]
    assert sum(size in common for size in sizes) > len(sizes) / 2
    assert len(set(sizes)) > 2
    for image in images:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert [sampling for _, *sampling, _ in image.layer] == [[2, 2], [1, 1], [1, 1]]


def test_amplitudes_fall_as_in_photographs(files):
    slopes = [spectrum_slope(np.asarray(Image.open(io.BytesIO(file)).convert("L"), float)) for file in files]
    assert -1.3 < np.mean(slopes) < -0.9
    assert all(-1.7 < slope < -0.7 for slope in slopes)


def test_color_channels_are_correlated_but_not_equal(files):
    pixels = np.concatenate([np.asarray(Image.open(io.BytesIO(file))).reshape(-1, 3) for file in files[:12]])
    correlation = np.corrcoef(pixels.T)[np.triu_indices(3, 1)]
    assert (correlation > 0.7).all()
    assert (correlation < 0.99).all()


def test_a_file_is_a_function_of_seed_and_index(files):
    assert photograph(7, seed=0) == files[7]
    assert photograph(7, seed=1) != files[7]
    assert len(set(files)) == len(files)


def test_the_folder_holds_the_classes_in_turn_whatever_the_workers(files, tmp_path):
    write_photographs(tmp_path / "data", 14, seed=0, workers=3)
    source = open_source(tmp_path / "data")
    assert len(source) == 14
    assert source.classes == tuple(sorted(name.replace(" ", "_") for name in CLASSES))
    first = next(iter(CLASSES)).replace(" ", "_")
    for number in (0, 12):
        assert (tmp_path / "data" / first / f"{number:06d}.jpg").read_bytes() == files[number]


def test_fewer_files_than_classes_leave_no_empty_class(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "photograph", lambda index, *, seed: b"jpeg")
    write_photographs(tmp_path, 3, seed=0)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file \(Not a directory\); take another folder"):
        write_photographs(tmp_path / "file", 1, seed=0)
