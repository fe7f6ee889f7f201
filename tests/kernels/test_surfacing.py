"""What must surface: NaN, invalid labels, the first of equal groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl_kernels as fk
from fastssl_kernels import parity, reference, use_backend
from fastssl_kernels.blockwise import losses as blockwise

Arguments = Callable[..., dict[str, Any]]
T = 0.2

each_backend = pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
# Tensors that affect their own row of the loss, and banks, which affect all rows
ROWS = {
    "info_nce": ("query", "key"),
    "unicon": ("query", "key"),
    "sup_con": ("query", "key"),
    "soft_cross_entropy": ("query", "teacher"),
    "consistency": ("query", "key"),
    "mixco": ("query", "weight"),
    "unmix": ("query", "first_key", "second_key", "weight"),
    "bank_cross_entropy": ("prediction",),
    "mean_shift": ("query", "key"),
    "queue_read": ("query",),
}
BANKS = {
    **dict.fromkeys(("info_nce", "unicon", "sup_con", "soft_cross_entropy", "consistency", "unmix"), ("queue",)),
    "mean_shift": ("queue",),
    "mixco": ("keys", "queue"),
    "bank_cross_entropy": ("bank",),
    "queue_read": ("bank",),
    "nt_xent": ("first", "second"),
}


def rows_of(name: str, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Rows of the loss and of the gradient to the first argument."""
    lead = next(iter(given))
    given = given | {lead: given[lead].detach().clone().requires_grad_()}
    options = {} if name == "queue_read" else {"reduction": "none"}
    result = getattr(fk, name)(**given, **options)
    loss = result.lse if name == "queue_read" else result
    return loss.detach(), torch.autograd.grad(loss.sum(), given[lead])[0]


@each_backend
@pytest.mark.parametrize(("name", "argument"), [(name, each) for name, rows in ROWS.items() for each in rows])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_value_surfaces_in_its_row(
    name: str, argument: str, value: float, backend: str, device: str, arguments: Arguments
) -> None:
    given = arguments(name, device)
    if argument == "weight":
        given["weight"] = torch.full((9,), 0.3, device=device)
    with use_backend(backend):
        clean, _ = rows_of(name, given)
        given[argument] = given[argument].clone()
        given[argument][4, ...] = value
        loss, gradient = rows_of(name, given)
    others = torch.arange(9, device=device) != 4
    assert not loss[4].isfinite() or not gradient[4].isfinite().all()
    if value != value:
        assert loss[4].isnan()
    torch.testing.assert_close(loss[others], clean[others])


@each_backend
@pytest.mark.parametrize(("name", "argument"), [(name, each) for name, banks in BANKS.items() for each in banks])
def test_nan_in_a_bank_surfaces_in_every_row(
    name: str, argument: str, backend: str, device: str, arguments: Arguments
) -> None:
    for entry in (0, 5, -1):
        given = arguments(name, device)
        given[argument] = given[argument].clone()
        given[argument][entry, 3] = torch.nan
        with use_backend(backend):
            assert rows_of(name, given)[0].isnan().all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_in_a_bank_surfaces_in_every_element_of_the_gradient(
    dtype: torch.dtype, backend: str, device: str, arguments: Arguments
) -> None:
    """Even where the weights are rounded as integers."""
    given = arguments("info_nce", device)
    given["queue"] = given["queue"].to(dtype)
    given["queue"][5, 3] = torch.nan
    with use_backend(backend):
        assert all(result.isnan().all() for result in rows_of("info_nce", given))


@pytest.mark.parametrize("name", ["info_nce", "unmix", "mean_shift"])
@pytest.mark.parametrize("entry", [0, 1023, 1024, 3999])
def test_nan_surfaces_from_any_block(name: str, entry: int) -> None:
    given = parity.make_inputs(33, 4000, 16).to(torch.float32, torch.float32)
    given.queue[entry, 7] = torch.nan
    assert parity.evaluate(name, given, T, "blockwise").values.isnan().all()


@each_backend
@pytest.mark.parametrize("name", ["info_nce", "unicon", "sup_con"])
def test_a_row_of_nan_counts_as_a_miss(name: str, backend: str, device: str, arguments: Arguments) -> None:
    given = arguments(name, device)
    given["key"] = given["query"].clone()
    given["queue"][3] = torch.nan
    with use_backend(backend):
        _, accuracy = getattr(fk, name)(**given, return_accuracy=True)
    assert accuracy == 0


@each_backend
def test_nan_in_groups_and_features(backend: str, device: str, arguments: Arguments) -> None:
    given = arguments("update_groups", device)
    with use_backend(backend):
        clean = fk.nearest_entry(given["features"], given["groups"])
        given["groups"][33] = torch.nan
        assert fk.nearest_entry(given["features"], given["groups"]).eq(33).all()
        groups, assignment = fk.update_groups(**given)
        assert assignment.eq(33).all()
        assert groups[33].isnan().all()
        given = arguments("update_groups", device)
        given["features"][2] = torch.nan
        groups, assignment = fk.update_groups(**given)
    others = torch.arange(9, device=device) != 2
    assert torch.equal(assignment[others], clean[others])
    assert assignment[2] == 0
    assert groups[assignment].isnan().all()


def labeled(name: str, arguments: Arguments) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arguments with an invalid label in each place; -2^63 is the internal value of an unknown one."""
    for argument in [key for key in arguments(name) if key.endswith("labels")]:
        for label in (-2, -100, torch.iinfo(torch.int64).min):
            given = arguments(name)
            given[argument] = given[argument].clone()
            given[argument][-1] = label
            yield f"{argument} holds {label}; a label is -1", given


@each_backend
@pytest.mark.parametrize("name", ["unicon", "sup_con", "nt_xent"])
def test_a_label_below_minus_one_is_refused(name: str, backend: str, arguments: Arguments) -> None:
    for sentence, given in labeled(name, arguments):
        with use_backend(backend), pytest.raises(ValueError, match=sentence):
            getattr(fk, name)(**given)


@pytest.mark.parametrize("name", ["unicon", "sup_con", "nt_xent"])
def test_a_label_below_minus_one_is_refused_in_compiled_code(name: str, arguments: Arguments) -> None:
    torch.compiler.reset()
    compiled = torch.compile(getattr(fk, name), fullgraph=True, backend="eager")
    for sentence, given in labeled(name, arguments):
        with use_backend("blockwise"), pytest.raises(ValueError, match=sentence):
            compiled(**given)
    with use_backend("reference"):  # Plain operations, which cannot refuse anything
        assert compiled(**given).isnan()


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("name", ["unicon_rows", "sup_con_rows"])
def test_a_label_below_minus_one_is_nan_where_it_is_not_checked(name: str, backend: str, device: str) -> None:
    """The implementations without checks, as on a GPU."""
    if backend == "triton":
        from fastssl_kernels.triton import losses as module
    else:
        module = blockwise
    given = parity.make_inputs(9, 150, 16).to(torch.float32, torch.float32, device)
    pair, labels = (given.query, given.key, given.queue), [given.query_labels, given.queue_labels]
    clean = getattr(module, name)(*pair, *labels, T, False)
    for label in (-2, torch.iinfo(torch.int64).min):
        wrong = labels[0].clone()
        wrong[3] = label
        found = getattr(module, name)(*pair, wrong, labels[1], T, False)
        others = torch.arange(9, device=device) != 3
        assert found.loss[3].isnan()
        assert torch.equal(found.loss[others], clean.loss[others])
        wrong = labels[1].clone()
        wrong[140] = label
        found = getattr(module, name)(*pair, labels[0], wrong, T, False)
        assert found.loss.isnan().all()
        assert found.gradient.isnan().all()


EQUAL = [(rows, groups) for rows in (1, 2, 4, 9, 257) for groups in (1, 2, 5, 17, 33, 40, 129)]


@each_backend
@pytest.mark.parametrize("kind", ["zero", "equal", "in pairs"])
def test_of_equal_groups_the_first_is_assigned(kind: str, backend: str, device: str) -> None:
    for rows, count in EQUAL:
        if backend == "triton" and rows not in (1, 9):  # The interpreter is slow
            continue
        for features in (16,) if backend == "triton" else (5, 16, 128):
            query, queue = with_exact_products(rows, count, features, device)
            groups = torch.zeros_like(queue) if kind == "zero" else queue[:1].expand(count, -1)
            expected = torch.zeros(rows, dtype=torch.int64, device=device)
            if kind == "in pairs":
                groups = torch.cat([queue, queue])
                expected = (query.double() @ queue.double().T).argmax(1)
            with use_backend(backend):
                assert torch.equal(fk.nearest_entry(query, groups), expected), (rows, count, features)


def with_exact_products(rows: int, count: int, features: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Integer values with a mean of 0: a matrix product may round others differently by column."""
    given = parity.make_inputs(rows, count, features).to(torch.float32, torch.float32, device)
    query, queue = (32 * given.query).round(), (32 * given.queue).round()
    return query, torch.cat([queue, -queue])


def test_of_equal_groups_in_other_blocks_the_first_is_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    query, queue = with_exact_products(300, 25, 16)
    groups = queue.repeat(4, 1)
    expected = reference.nearest_entry(query, queue)
    for length in (1, 7, 50, 64):
        monkeypatch.setattr("fastssl_kernels.blockwise.stream._block_length", lambda _, length=length: length)
        with use_backend("blockwise"):
            assert torch.equal(fk.nearest_entry(query, groups), expected)
