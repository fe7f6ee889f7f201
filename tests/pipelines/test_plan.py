"""The plan: purity, exact resume, and the distributions of torchvision's transforms."""

from __future__ import annotations

import zlib
from dataclasses import fields, replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from fastssl_pipelines import (
    BatchPlan,
    DataError,
    EvaluationSampler,
    SamplePlan,
    TrainSampler,
    ViewPlan,
    ViewSpec,
    partial_labels,
)

STRONG = ViewSpec(size=32, blur=0.5, solarize=0.2)
WEAK = ViewSpec(size=16, scale=(0.05, 0.3), jitter=(0.8, 0.8, 0.8, 0.2), blur=1.0)


def make_plan(n=100, width=40, height=30, views=(STRONG, WEAK), seed=0, shuffle=True) -> SamplePlan:
    return SamplePlan(
        widths=np.full(n, width),
        heights=np.full(n, height),
        labels=np.arange(n) % 7,
        views=views,
        seed=seed,
        shuffle=shuffle,
    )


def arrays(view: ViewPlan) -> dict[str, np.ndarray]:
    return {field.name: getattr(view, field.name) for field in fields(view) if field.name != "size"}


def assert_equal(first: BatchPlan, second: BatchPlan) -> None:
    np.testing.assert_array_equal(first.ids, second.ids)
    np.testing.assert_array_equal(first.labels, second.labels)
    assert len(first.views) == len(second.views)
    for one, other in zip(first.views, second.views, strict=True):
        assert one.size == other.size
        for name, values in arrays(one).items():
            np.testing.assert_array_equal(values, getattr(other, name), err_msg=name)


def test_shapes_and_dtypes_are_the_contract():
    batch = make_plan().batch(0, 0, 5)
    assert (batch.ids.dtype, batch.labels.dtype) == (np.int64, np.int64)
    expected = {"boxes": np.int32, "order": np.int64, "flip": bool, "grayscale": bool, "solarize": bool}
    for view in batch.views:
        for name, values in arrays(view).items():
            assert values.dtype == expected.get(name, np.float32), name
            assert values.shape == ((5, 4) if name in ("boxes", "order") else (5,)), name


def test_a_sub_range_has_the_values_of_the_whole():
    whole = make_plan().batch(3, 0, 100)
    assert_equal(make_plan().batch(3, 0, 100), whole)
    for start, stop in [(0, 1), (17, 60), (99, 100), (40, 40)]:
        assert_equal(make_plan().batch(3, start, stop), whole.rows(start, stop))


def test_the_cached_order_cannot_be_changed_through_a_batch():
    plan = make_plan()
    before = plan.batch(0, 0, 10).ids.copy()
    plan.batch(0, 0, 10).ids[:] = 0
    np.testing.assert_array_equal(plan.batch(0, 0, 10).ids, before)


def test_seed_epoch_position_and_view_all_change_the_values():
    plan = make_plan(views=(STRONG, STRONG))
    batches = [plan.batch(0, 0, 50), plan.batch(1, 0, 50), plan.batch(0, 50, 100)]
    batches.append(make_plan(views=(STRONG, STRONG), seed=1).batch(0, 0, 50))
    drawn = [view.brightness for batch in batches for view in batch.views]
    for number, one in enumerate(drawn):
        for other in drawn[:number]:
            assert np.mean(one == other) < 0.3  # Neutral values may coincide, drawn ones do not
    assert len({tuple(batch.ids) for batch in batches}) == len(batches)


def test_an_epoch_visits_every_sample_once():
    plan = make_plan()
    for epoch in (0, 1, 1000):
        np.testing.assert_array_equal(np.sort(plan.batch(epoch, 0, 100).ids), np.arange(100))
    np.testing.assert_array_equal(make_plan(shuffle=False).batch(4, 0, 100).ids, np.arange(100))


def test_adding_a_view_leaves_the_others_alone():
    one, two = make_plan(views=(STRONG,)).batch(2, 0, 100), make_plan().batch(2, 0, 100)
    assert_equal(one, replace(two, views=two.views[:1]))


def test_odd_steps_take_the_odd_views():
    flat = replace(STRONG, solarize=0.0, blur=0.0)
    plan = make_plan()
    swapping = SamplePlan(
        widths=plan.widths,
        heights=plan.heights,
        labels=plan.labels,
        views=(STRONG, WEAK),
        odd_views=(flat, WEAK),
        seed=0,
    )
    usual, ours = TrainSampler(plan, batch_size=30), TrainSampler(swapping, batch_size=30)
    for step in range(6):
        assert (ours[step].views[0].blur_sigma > 0).any() == (step % 2 == 0)
        np.testing.assert_array_equal(ours[step].views[0].boxes, usual[step].views[0].boxes)
        assert_equal(replace(ours[step], views=ours[step].views[1:]), replace(usual[step], views=usual[step].views[1:]))


def test_changing_one_augmentation_leaves_the_other_values_alone():
    plain = make_plan(views=(replace(STRONG, blur=0.0, solarize=0.0),)).batch(0, 0, 100).views[0]
    strong = make_plan(views=(STRONG,)).batch(0, 0, 100).views[0]
    for name, values in arrays(plain).items():
        if name not in ("blur_sigma", "solarize"):
            np.testing.assert_array_equal(values, getattr(strong, name), err_msg=name)


def test_two_ranks_of_16_have_the_samples_of_one_rank_of_32():
    one = TrainSampler(make_plan(), batch_size=32)
    two = [TrainSampler(make_plan(), batch_size=16, rank=rank, world_size=2) for rank in (0, 1)]
    assert one.steps_per_epoch == two[0].steps_per_epoch == 3
    for step in (0, 2, 3, 7):
        assert_equal(two[0][step], one[step].rows(0, 16))
        assert_equal(two[1][step], one[step].rows(16, 32))


def test_starting_at_a_step_equals_running_to_it():
    walked = TrainSampler(make_plan(), batch_size=32)
    for step in range(6):
        batch = walked[step]
    assert_equal(TrainSampler(make_plan(), batch_size=32)[5], batch)


def test_a_batch_larger_than_the_data_set_names_the_option():
    with pytest.raises(DataError, match=r"--train\.batch-size .* 128 images and the data set has 100"):
        TrainSampler(make_plan(), batch_size=64, world_size=2)


def test_evaluation_is_in_order_and_ends_with_what_is_left():
    steps = EvaluationSampler(make_plan(n=10, shuffle=False), batch_size=4)
    assert [len(steps[step].ids) for step in range(len(steps))] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([batch.ids for batch in steps]), np.arange(10))
    with pytest.raises(IndexError):
        steps[3]


@pytest.mark.parametrize(("epoch", "start", "stop"), [(-1, 0, 1), (0, -1, 1), (0, 5, 4), (0, 0, 101)])
def test_positions_outside_the_epoch_are_refused(epoch, start, stop):
    with pytest.raises(ValueError, match="hold 100 samples"):
        make_plan().batch(epoch, start, stop)


def test_arrays_of_different_lengths_and_bad_seeds_are_refused():
    with pytest.raises(ValueError, match=r"must be \[n\]"):
        SamplePlan(widths=[1, 2], heights=[1], labels=[0, 0], views=[STRONG], seed=0)
    with pytest.raises(ValueError, match="seed -1"):
        make_plan(seed=-1)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (32, 32), (600, 200), (70, 640)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.14)])
def test_boxes_follow_torchvision(width, height, scale):
    n = 4000
    spec = ViewSpec(size=8, scale=scale)
    ours = make_plan(n, width, height, views=(spec,)).batch(0, 0, n).views[0].boxes
    torch.manual_seed(0)
    image = torch.empty(3, height, width, dtype=torch.uint8)
    theirs = np.array([RandomResizedCrop.get_params(image, list(spec.scale), list(spec.ratio)) for _ in range(n)])
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] + b[:, 2],
        lambda b: b[:, 1] + b[:, 3],
    ):
        assert kolmogorov_smirnov(statistic(ours), statistic(theirs)) < 1.95 * np.sqrt(2 / n)


def kolmogorov_smirnov(first: np.ndarray, second: np.ndarray) -> float:
    at = np.union1d(first, second)
    return np.max(
        np.abs(
            np.searchsorted(np.sort(first), at, side="right") / len(first)
            - np.searchsorted(np.sort(second), at, side="right") / len(second)
        )
    )


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (401, 1), (1, 401), (1, 1), (97, 31)])
def test_the_fallback_box_is_that_of_torchvision(width, height):
    spec = ViewSpec(size=8, scale=(1.0, 1.0))
    box = make_plan(1, width, height, views=(spec,)).batch(0, 0, 1).views[0].boxes[0]
    image = torch.empty(3, height, width, dtype=torch.uint8)
    assert tuple(box) == RandomResizedCrop.get_params(image, [1.0, 1.0], list(spec.ratio))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=20),
    scale=st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    center_crop=st.none() | st.floats(0.01, 1),
    seed=st.integers(0, 2**64 - 1),
)
def test_boxes_lie_inside_the_image(sizes, scale, ratio, center_crop, seed):
    widths, heights = np.array(sizes).T
    spec = ViewSpec(size=8, scale=tuple(scale), ratio=tuple(ratio), center_crop=center_crop)
    plan = SamplePlan(
        widths=widths, heights=heights, labels=np.zeros(len(sizes)), views=[spec], seed=seed, shuffle=False
    )
    top, left, height, width = plan.batch(0, 0, len(sizes)).views[0].boxes.T
    assert (np.stack([top, left]) >= 0).all()
    assert (np.stack([height, width]) >= 1).all()
    assert (top + height <= heights).all()
    assert (left + width <= widths).all()


def test_probabilities_and_ranges_are_those_of_the_spec():
    n = 20_000
    view = make_plan(n, views=(STRONG,)).batch(0, 0, n).views[0]
    jittered = (view.brightness != 1) | (view.contrast != 1) | (view.saturation != 1) | (view.hue != 0)
    for applied, probability in [
        (view.flip, STRONG.flip),
        (view.grayscale, STRONG.grayscale),
        (view.solarize, STRONG.solarize),
        (view.blur_sigma > 0, STRONG.blur),
        (jittered, STRONG.jitter_probability),
    ]:
        assert abs(applied.mean() - probability) < 4 * np.sqrt(probability * (1 - probability) / n)
    for values, low, high in [
        (view.brightness[jittered], 0.6, 1.4),
        (view.contrast[jittered], 0.6, 1.4),
        (view.saturation[jittered], 0.6, 1.4),
        (view.hue[jittered], -0.1, 0.1),
        (view.blur_sigma[view.blur_sigma > 0], 0.1, 2.0),
    ]:
        share = (values - low) / (high - low)
        assert kolmogorov_smirnov(share, np.linspace(0, 1, 10_001)) < 0.025
        assert share.min() >= -1e-6
        assert share.max() <= 1 + 1e-6


def test_values_of_a_view_are_independent():
    n = 20_000
    view = make_plan(n, width=4000, height=4000, views=(replace(STRONG, jitter_probability=1.0),)).batch(0, 0, n)
    numbers = [values.reshape(n, -1).astype(float) for values in arrays(view.views[0]).values()]
    columns = np.concatenate([numbers[0][:, 2:3] / numbers[0][:, 3:4], *numbers[1:6], *numbers[7:]], axis=1)
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(n)


def test_the_order_of_the_jitter_is_uniform_over_the_24_permutations():
    n = 24_000
    order = make_plan(n, views=(STRONG,)).batch(0, 0, n).views[0].order
    counts = [np.sum((order == candidate).all(1)) for candidate in permutations(range(4))]
    assert sum(counts) == n
    assert max(abs(count - 1000) for count in counts) < 4 * np.sqrt(1000)


def test_strong_jitter_never_turns_negative():
    n = 2000
    view = make_plan(n, views=(ViewSpec(size=8, jitter=(1, 1, 1, 0.5), jitter_probability=1.0),)).batch(0, 0, n)
    assert min(view.views[0].brightness.min(), view.views[0].saturation.min()) >= 0
    assert np.abs(view.views[0].hue).max() <= 0.5


def test_a_center_view_is_neutral():
    view = make_plan(3, width=40, height=30, views=(ViewSpec(size=24, center_crop=0.875),)).batch(0, 0, 3).views[0]
    assert view.boxes.tolist() == [[2, 7, 26, 26]] * 3
    assert not (view.flip | view.grayscale | view.solarize).any()
    assert (view.brightness == 1).all()
    assert (view.contrast == 1).all()
    assert (view.saturation == 1).all()
    assert (view.hue == 0).all()
    assert (view.blur_sigma == 0).all()
    assert view.order.tolist() == [[0, 1, 2, 3]] * 3


def test_golden_values_of_a_plan():
    """The plan determines every run: if this fails, old runs cannot be resumed."""
    batch = make_plan(1000, width=500, height=375).batch(3, 0, 1000)
    view = batch.views[1]
    assert batch.ids[:8].tolist() == GOLDEN["ids"]
    assert view.boxes[:3].tolist() == GOLDEN["boxes"]
    assert view.order[:3].tolist() == GOLDEN["order"]
    assert view.flip[:8].astype(int).tolist() == GOLDEN["flip"]
    np.testing.assert_allclose(view.brightness[:4], GOLDEN["brightness"], rtol=1e-6)
    np.testing.assert_allclose(view.hue[:4], GOLDEN["hue"], rtol=1e-6)
    np.testing.assert_allclose(view.blur_sigma[:4], GOLDEN["blur_sigma"], rtol=1e-6)
    assert [zlib.crc32(np.ascontiguousarray(a)) for a in (batch.ids, view.boxes, view.order)] == GOLDEN["crc32"]
    kept = np.flatnonzero(partial_labels(np.arange(100) % 10, 0.1, 0) >= 0)
    assert kept.tolist() == GOLDEN["partial_labels"]


GOLDEN: dict[str, list] = {
    "ids": [466, 260, 631, 380, 477, 220, 487, 965],
    "boxes": [[78, 171, 176, 175], [6, 117, 237, 226], [270, 133, 104, 109]],
    "order": [[0, 1, 2, 3], [2, 1, 3, 0], [2, 0, 1, 3]],
    "flip": [0, 1, 0, 0, 0, 1, 1, 1],
    "brightness": [0.2279314, 0.2322538, 1.0, 1.6608104],
    "hue": [0.16300136, 0.05773964, 0.0, -0.11358569],
    "blur_sigma": [0.2552894, 0.3365285, 1.657093, 0.4962099],
    "crc32": [1896052462, 3937251588, 102935899],
    "partial_labels": [6, 24, 31, 33, 40, 45, 52, 59, 77, 88],
}


def test_partial_labels_are_balanced_and_nested():
    labels = np.repeat([0, 1, 2, -1], [100, 50, 7, 20])
    np.random.default_rng(0).shuffle(labels)
    previous = np.zeros(len(labels), bool)
    for fraction in (0.0, 0.01, 0.1, 0.3, 0.5, 1.0):
        partial = partial_labels(labels, fraction, seed=5)
        kept = partial >= 0
        np.testing.assert_array_equal(partial[kept], labels[kept])
        assert np.bincount(partial[kept], minlength=3).tolist() == [round(fraction * n) for n in (100, 50, 7)]
        assert (kept >= previous).all()
        previous = kept
    np.testing.assert_array_equal(partial, labels)


def test_partial_labels_depend_on_the_seed():
    labels = np.arange(1000) % 10
    np.testing.assert_array_equal(partial_labels(labels, 0.3, 1), partial_labels(labels, 0.3, 1))
    assert (partial_labels(labels, 0.3, 1) != partial_labels(labels, 0.3, 2)).any()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_label_fraction_outside_the_range_is_refused(fraction):
    with pytest.raises(DataError, match=r"--data\.label-fraction"):
        partial_labels([0, 1], fraction, 0)


def test_an_unlabeled_tail_leaves_the_kept_labels_alone():
    labels = np.random.default_rng(0).integers(0, 5, 300)
    joint = partial_labels(np.concatenate([labels, np.full(1000, -1)]), 0.2, seed=3)
    np.testing.assert_array_equal(joint[:300], partial_labels(labels, 0.2, seed=3))
    assert (joint[300:] == -1).all()


def test_a_label_below_minus_one_is_refused():
    with pytest.raises(ValueError, match="label -2 was given; it must be -1"):
        SamplePlan(widths=[9] * 3, heights=[9] * 3, labels=[0, -1, -2], views=[STRONG], seed=0)
