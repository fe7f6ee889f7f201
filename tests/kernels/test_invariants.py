"""Properties that follow from the definitions: relations between losses, limits, symmetries."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastssl_kernels as fk
from fastssl_kernels import parity, use_backend
from fastssl_kernels.parity import Inputs, make_inputs

T = 0.1


@pytest.fixture(params=["reference", "blockwise", "triton"])
def given(request: pytest.FixtureRequest) -> Iterator[Inputs]:
    """Inputs, and the backend that the test runs on: float64, or float32 on Triton."""
    triton = request.param == "triton"
    device = "cuda" if triton and torch.cuda.is_available() else "cpu"
    with use_backend(request.param):
        yield make_inputs(9, 70, 32).to(*[torch.float32 if triton else torch.float64] * 2, device)


def run(function: Callable[..., Any], query: Tensor, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Rows of the loss, and the gradient of their sum."""
    query = query.clone().requires_grad_()
    rows = function(query, *args, **options, reduction="none")
    return rows.detach(), torch.autograd.grad(rows.sum(), query)[0]


def assert_same(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    tolerance = 1e-10 if expected[0].dtype == torch.float64 else 5e-6
    for given, wanted in zip(result, expected, strict=True):
        assert given.shape == wanted.shape
        assert (given - wanted).norm() <= tolerance * max(1.0, wanted.norm())


def labels(given: Inputs) -> dict[str, Tensor]:
    return {"query_labels": given.query_labels, "queue_labels": given.queue_labels}


@pytest.mark.parametrize("loss", [fk.unicon, fk.sup_con])
@pytest.mark.parametrize("case", ["all unknown", "no match"])
def test_labels_without_a_match_give_info_nce(given: Inputs, loss: Callable[..., Any], case: str) -> None:
    expected = run(fk.info_nce, given.query, given.key, given.queue, temperature=T)
    if case == "all unknown":
        given.query_labels.fill_(-1)
        given.queue_labels.fill_(-1)
    else:
        given.query_labels.add_(100)
    assert_same(run(loss, given.query, given.key, given.queue, **labels(given), temperature=T), expected)


@pytest.mark.parametrize("loss", [fk.unicon, fk.sup_con])
def test_the_order_of_the_queue_does_not_matter(given: Inputs, loss: Callable[..., Any]) -> None:
    expected = run(loss, given.query, given.key, given.queue, **labels(given), temperature=T)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).to(given.queue.device)
    shuffled = {"query_labels": given.query_labels, "queue_labels": given.queue_labels[order]}
    assert_same(run(loss, given.query, given.key, given.queue[order], **shuffled, temperature=T), expected)


def test_unicon_is_the_sum_over_all_pairs(given: Inputs) -> None:
    rows, _ = run(fk.unicon, given.query, given.key, given.queue, **labels(given), temperature=T)
    logits = torch.cat([(given.query * given.key).sum(1, keepdim=True), given.query @ given.queue.T], 1) / T
    expected = []
    for row, label in zip(logits, given.query_labels, strict=True):
        positive = torch.cat([label.new_ones(1) > 0, (given.queue_labels == label) & (label != -1)])
        expected.append((row[~positive][:, None] - row[positive]).exp().sum().log1p())
    assert_same((rows,), (torch.stack(expected),))


def test_unicon_without_negatives_is_zero(given: Inputs) -> None:
    given.queue_labels.fill_(5)
    given.query_labels.fill_(5)[0] = -1
    rows, gradient = run(fk.unicon, given.query, given.key, given.queue, **labels(given), temperature=T)
    assert not rows[1:].any()
    assert not gradient[1:].any()
    assert rows[0] > 0
    assert gradient[0].isfinite().all()


@pytest.mark.parametrize("include_positive", [False, True])
def test_consistency_of_equal_rows_is_zero(given: Inputs, include_positive: bool) -> None:
    options = {"temperature": T, "include_positive": include_positive}
    zero = torch.zeros_like(given.query)
    assert_same(run(fk.consistency, given.query, given.query, given.queue, **options), (zero[:, 0], zero))


@pytest.mark.parametrize("include_positive", [False, True])
def test_consistency_is_symmetric(given: Inputs, include_positive: bool) -> None:
    options = {"temperature": T, "include_positive": include_positive}
    forth, _ = run(fk.consistency, given.query, given.key, given.queue, **options)
    back, _ = run(fk.consistency, given.key, given.query, given.queue, **options)
    assert (forth > 0).all()
    assert_same((forth,), (back,))


def test_soft_cross_entropy_of_its_own_teacher_is_the_entropy(given: Inputs) -> None:
    options = {"temperature": T, "teacher_temperature": T}
    probability = (given.query @ given.queue.T / T).softmax(1)
    entropy = -(probability * probability.log()).sum(1)
    result = run(fk.soft_cross_entropy, given.query, given.query, given.queue, **options)
    assert_same(result, (entropy, torch.zeros_like(given.query)))


def test_soft_cross_entropy_is_at_least_the_teachers_entropy(given: Inputs) -> None:
    rows, _ = run(fk.soft_cross_entropy, given.query, given.key, given.queue, temperature=T, teacher_temperature=T / 2)
    probability = (given.key @ given.queue.T / (T / 2)).softmax(1)
    assert (rows > -(probability * probability.log()).sum(1)).all()


def test_equal_teachers_equal_one_teacher(given: Inputs) -> None:
    options = {"temperature": T, "teacher_temperature": T / 2}
    expected = run(fk.soft_cross_entropy, given.query, given.key, given.queue, **options)
    three = given.key.expand(3, *given.key.shape)
    assert_same(run(fk.soft_cross_entropy, given.query, three, given.queue, **options), expected)


def test_teachers_are_averaged(given: Inputs) -> None:
    options = {"temperature": T, "teacher_temperature": T / 2}
    keys = (given.key, given.second_key)
    each = [run(fk.soft_cross_entropy, given.query, key, given.queue, **options) for key in keys]
    both = run(fk.soft_cross_entropy, given.query, torch.stack(keys), given.queue, **options)
    assert_same(both, tuple((x + y) / 2 for x, y in zip(*each, strict=True)))


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_mixco_of_one_image_is_info_nce_with_the_other_keys_as_negatives(given: Inputs, weight: float) -> None:
    own, second = torch.arange(9, device=given.query.device), given.partner
    rows, gradient = run(
        fk.mixco, given.query, given.key, given.queue, first=own, second=second, weight=weight, temperature=T
    )
    for i in (0, 5):
        target = i if weight else int(second[i])
        negatives = torch.cat([given.key[own != target], given.queue])
        expected = run(fk.info_nce, given.query[i : i + 1], given.key[target][None], negatives, temperature=T)
        assert_same((rows[i : i + 1], gradient[i : i + 1]), expected)


@pytest.mark.parametrize("loss", ["mixco", "unmix"])
def test_mixtures_are_linear_in_the_weight(given: Inputs, loss: str) -> None:
    def at(weight: float) -> tuple[Tensor, Tensor]:
        if loss == "unmix":
            keys = (given.key, given.second_key, given.queue)
            return run(fk.unmix, given.query, *keys, weight=weight, temperature=T)
        index = {"first": given.partner, "second": given.partner.flip(0)}
        return run(fk.mixco, given.query, given.key, given.queue, **index, weight=weight, temperature=T)

    ends = zip(at(1.0), at(0.0), strict=True)
    assert_same(at(0.3), tuple(0.3 * x + 0.7 * y for x, y in ends))


def test_unmix_of_one_image_is_info_nce(given: Inputs) -> None:
    keys = (given.key, given.second_key)
    for weight, key in zip((1.0, 0.0), keys, strict=True):
        expected = run(fk.info_nce, given.query, key, given.queue, temperature=T)
        assert_same(run(fk.unmix, given.query, *keys, given.queue, weight=weight, temperature=T), expected)


def test_unmix_of_halves_is_symmetric(given: Inputs) -> None:
    keys = (given.key, given.key.flip(0))
    expected = run(fk.unmix, given.query, *keys, given.queue, weight=0.5, temperature=T)
    assert_same(run(fk.unmix, given.query, *keys[::-1], given.queue, weight=0.5, temperature=T), expected)


def test_groups_stay_with_momentum_one(given: Inputs) -> None:
    groups, assignment = fk.update_groups(given.query, given.queue, momentum=1.0)
    assert_same((groups,), (given.queue,))
    assert torch.equal(assignment, (given.query @ given.queue.T).argmax(1))


def test_a_group_without_rows_stays_and_one_with_rows_is_their_mean(given: Inputs) -> None:
    groups, assignment = fk.update_groups(given.query, given.queue, momentum=0.0)
    empty = torch.ones(70, dtype=torch.bool, device=groups.device)
    empty[assignment] = False
    assert_same((groups[empty],), (given.queue[empty],))
    for group in assignment.unique().tolist():
        mean = given.query[assignment == group].mean(0)
        assert_same((groups[group],), (F.normalize(mean, dim=0),))


def test_rows_are_assigned_to_the_nearest_group(given: Inputs) -> None:
    query, groups = given.query.clone().requires_grad_(), given.queue.clone().requires_grad_()
    assignment = fk.nearest_entry(query, groups)
    assert assignment.dtype == torch.int64
    assert torch.equal(assignment, (given.query @ given.queue.T).argmax(1))


def test_a_momentum_may_be_a_tensor(given: Inputs) -> None:
    momentum = torch.tensor(0.75, device=given.query.device)
    expected = fk.update_groups(given.query, given.queue, momentum=0.75)[0]
    assert_same(fk.update_groups(given.query, given.queue, momentum=momentum)[:1], (expected,))
    with pytest.raises(ValueError, match=r"momentum has shape \[9\]; it must be a number"):
        fk.update_groups(given.query, given.queue, momentum=momentum.expand(9))


def test_the_sums_of_groups_do_not_depend_on_the_block(given: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fk.update_groups(given.query, given.queue, momentum=0.7)[0]
    monkeypatch.setattr("fastssl_kernels.groups._MASK_ELEMENTS", 4 * 70)  # 4 rows, then 4, then 1
    assert_same(fk.update_groups(given.query, given.queue, momentum=0.7)[:1], (expected,))


def test_bank_cross_entropy_is_info_nce_of_the_target(given: Inputs) -> None:
    target = given.target[0]
    rows, gradient = run(fk.bank_cross_entropy, given.query, given.queue, target, temperature=T)
    others = given.queue[torch.arange(70, device=target.device) != target[0]]
    expected = run(fk.info_nce, given.query[:1], given.queue[target[:1]], others, temperature=T)
    assert_same((rows[:1], gradient[:1]), expected)


def test_mean_shift_to_an_enqueued_key_is_byol(given: Inputs) -> None:
    queue = torch.cat([given.queue, given.key])
    expected = (2 - 2 * (given.query * given.key).sum(1), -2 * given.key)
    assert_same(run(fk.mean_shift, given.query, given.key, queue, k=1), expected)


def test_nt_xent_of_one_row_is_info_nce_with_the_rest_as_negatives(given: Inputs) -> None:
    rows = fk.nt_xent(given.query, given.key, temperature=T, reduction="none")
    others = torch.cat([given.query[1:], given.key[1:]])
    for i, (own, view) in enumerate(((given.query, given.key), (given.key, given.query))):
        expected, _ = run(fk.info_nce, own[:1], view[:1], others, temperature=T)
        assert_same((rows[9 * i : 9 * i + 1],), (expected,))


def test_nt_xent_with_every_label_unknown_equals_nt_xent_without_labels(given: Inputs) -> None:
    unknown = {"labels": torch.full_like(given.query_labels, -1)}
    expected = run(fk.nt_xent, given.query, given.key, temperature=T)
    assert_same(run(fk.nt_xent, given.query, given.key, temperature=T, **unknown), expected)


@pytest.mark.parametrize("sizes", [[70], [1, 69], [16, 16, 38], [33, 4, 33]], ids=str)
def test_reads_of_a_split_bank_merge_to_the_whole(given: Inputs, sizes: list[int]) -> None:
    whole = fk.queue_read(given.query, given.queue, temperature=T)
    parts = [fk.queue_read(given.query, part, temperature=T) for part in given.queue.split(sizes)]
    lse = torch.stack([part.lse for part in parts])
    mean = (lse.softmax(0)[..., None] * torch.stack([part.mean for part in parts])).sum(0)
    assert_same((lse.logsumexp(0), mean), (whole.lse, whole.mean))


def test_info_nce_is_a_queue_read_with_the_own_key(given: Inputs) -> None:
    def from_read(query: Tensor, reduction: str) -> Tensor:
        own = (query * given.key).sum(1) / T
        return torch.logaddexp(fk.queue_read(query, given.queue, temperature=T).lse, own) - own

    expected = run(fk.info_nce, given.query, given.key, given.queue, temperature=T)
    assert_same(run(from_read, given.query), expected)


@pytest.mark.parametrize("loss", ["info_nce", "unicon", "sup_con", "unmix"])
def test_keys_count_only_through_their_own_logit(given: Inputs, loss: str) -> None:
    """A key of the batch is not a negative: rotating it about its query changes no loss."""
    generator = torch.Generator().manual_seed(2)

    def turn(key: Tensor) -> Tensor:
        along = (given.query * key).sum(1, keepdim=True)
        noise = torch.randn(key.shape, generator=generator, dtype=torch.float64).to(key)
        across = F.normalize(noise - (noise * given.query).sum(1, keepdim=True) * given.query, dim=1)
        return along * given.query + (1 - along**2).sqrt() * across

    turned = replace(given, key=turn(given.key), second_key=turn(given.second_key))
    call = parity.LOSSES[loss].call
    assert (turned.key - given.key).norm(dim=1).min() > 0.1
    assert_same(call(turned, T), call(given, T))


@pytest.mark.parametrize("loss", parity.LOSSES)
def test_the_gradient_is_orthogonal_to_rows_before_normalization(given: Inputs, loss: str) -> None:
    raw = (3 * given.query).requires_grad_()
    total = sum(x.pow(3).sum() for x in parity.LOSSES[loss].call(replace(given, query=F.normalize(raw, dim=1)), T))
    (gradient,) = torch.autograd.grad(total, raw)
    assert gradient.norm() > 0.01
    assert_same((F.cosine_similarity(gradient, raw),), (torch.zeros_like(gradient[:, 0]),))


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_groups_move_to_the_rows_that_the_caller_assigned(backend: str) -> None:
    given = make_inputs(9, 5, 16).to(torch.float32, torch.float32)
    chosen = torch.arange(9) % 3
    with use_backend(backend):
        groups, assignment = fk.update_groups(given.query, given.queue, momentum=0.0, assignment=chosen)
        own = fk.update_groups(given.query, given.queue, momentum=0.5)
        again = fk.update_groups(given.query, given.queue, momentum=0.5, assignment=own[1])
    assert torch.equal(assignment, chosen)
    means = F.normalize(torch.stack([given.query[chosen == number].mean(0) for number in range(3)]), dim=1)
    torch.testing.assert_close(groups, torch.cat([means, given.queue[3:]]), rtol=0, atol=1e-6)
    assert_same(again[:1], own[:1])


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_invalid_assignments_are_refused(backend: str) -> None:
    given = make_inputs(9, 5, 16).to(torch.float32, torch.float32)
    for wrong, error, words in (
        (torch.full((9,), 5), IndexError, "assignment holds 5; it must hold indices into groups, from 0 to 4"),
        (torch.zeros(8, dtype=torch.int64), ValueError, r"assignment has shape \[8\]"),
        (torch.zeros(9, dtype=torch.int32), TypeError, "assignment has dtype torch.int32"),
    ):
        with use_backend(backend), pytest.raises(error, match=words):
            fk.update_groups(given.query, given.queue, momentum=0.0, assignment=wrong)
