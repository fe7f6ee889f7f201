from __future__ import annotations

import numpy as np

from fastssl_pipelines.synthetic.shapes import CLASSES, draw_pictures, picture_source


def test_pictures_are_a_pure_function_of_their_arguments():
    images, labels = draw_pictures(60, seed=1)
    again, _ = draw_pictures(60, seed=1)
    assert np.array_equal(images, again)
    for other in (draw_pictures(60, seed=2), draw_pictures(60, seed=1, stream=1)):
        assert np.array_equal(labels, other[1])
        assert (images != other[0]).mean() > 0.9


def test_pictures_have_the_promised_shape_and_balance():
    images, labels = draw_pictures(125, seed=0, size=20)
    assert images.shape == (125, 20, 20, 3)
    assert images.dtype == np.uint8
    assert len(CLASSES) >= 10
    counts = np.bincount(labels)
    assert len(counts) == len(CLASSES)
    assert counts.max() - counts.min() <= 1


def test_color_and_position_do_not_reveal_the_class():
    """Mean colors of the classes differ no more than those of random groups: within 5 standard errors."""
    images, labels = draw_pictures(2400, seed=3)
    color = images.reshape(len(images), -1, 3).mean(1)
    means = np.stack([color[labels == c].mean(0) for c in range(len(CLASSES))])
    standard_error = color.std(0) / np.sqrt((labels == 0).sum())
    assert (np.abs(means - color.mean(0)) < 5 * standard_error).all()


def test_the_source_returns_the_pictures():
    source = picture_source(24, seed=5)
    images, labels = draw_pictures(24, seed=5)
    assert np.array_equal(source.labels, labels)
    assert all(np.array_equal(source.pixels(i), images[i]) for i in range(24))
    assert source.classes == tuple(CLASSES)
