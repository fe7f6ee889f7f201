"""The Triton kernel that finds a row's nearest entries, against a sort in float64."""

import pytest
import torch
from torch import Tensor

from fastssl_kernels import parity
from tests.kernels.layouts import coarse

SHAPES = {  # Rows, entries, features, count
    "one": (1, 1, 5, 1),
    "fewer entries than a tile": (3, 20, 16, 5),
    "every entry": (2, 11, 48, 11),
    "tails": (130, 70, 130, 3),
    "whole tiles": (128, 128, 64, 2),
    "wide": (4, 70, 512, 4),
    "splits, the last of 3 entries": (4, 20 * 64 + 3, 16, 8),
}


def find(rows: Tensor, bank: Tensor, count: int) -> Tensor:
    from fastssl_kernels.triton.nearest import nearest

    return nearest(rows, bank, count)


def truth(rows: Tensor, bank: Tensor, count: int) -> Tensor:
    """The nearest entries by sorting; of equal entries the earlier first."""
    similarity = rows.to(bank.dtype).double() @ bank.double().T
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :count]


@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_nearest_are_the_first_of_a_sort(shape: tuple[int, int, int, int], bank_dtype: torch.dtype) -> None:
    rows, entries, features, count = shape
    given = parity.make_inputs(rows, entries, features).to(torch.float32, bank_dtype)
    found = find(given.query, given.queue, count)
    assert found.dtype == torch.int64
    assert torch.equal(found, truth(given.query, given.queue, count))


def test_triton_nearest_reads_a_bank_in_splits() -> None:
    from fastssl_kernels.triton import nearest

    given = parity.make_inputs(4, 20 * 64 + 3, 16).to(torch.float32, torch.float32)
    kept = nearest._read(given.query, given.queue, 8, None)
    assert kept.shape[1] >= 3 * 8


@pytest.mark.parametrize("count", [1, 4, 16])
def test_triton_nearest_of_equal_entries_is_the_earlier(count: int) -> None:
    given = parity.make_inputs(5, 600, 16).to(torch.bfloat16, torch.bfloat16)
    bank = given.queue[torch.arange(600) % 7]
    assert torch.equal(find(given.query, bank, count), truth(given.query, bank, count))
    assert torch.equal(find(torch.zeros_like(given.query), bank, count), torch.arange(count).expand(5, count))


def test_triton_nearest_of_more_than_one_pass() -> None:
    given = parity.make_inputs(3, 45, 16).to(torch.float32, torch.float32)
    assert torch.equal(find(given.query, given.queue, 45), truth(given.query, given.queue, 45))
    query, repeated = coarse(given.query), coarse(given.queue)[torch.arange(90) % 7]
    assert torch.equal(find(query, repeated, 40), truth(query, repeated, 40))


def test_triton_nearest_of_nan_is_a_valid_index_and_does_not_change_other_rows() -> None:
    # Fewer than a tile: the interpreter cannot take a maximum of only NaN
    given = parity.make_inputs(3, 30, 16).to(torch.float32, torch.float32)
    expected = truth(given.query, given.queue, 20)
    given.query[1] = torch.nan
    found = find(given.query, given.queue, 20)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert ((found >= 0) & (found < 30)).all()


def test_triton_nearest_of_negative_similarities() -> None:
    given = parity.make_inputs(3, 50, 16).to(torch.float32, torch.float32)
    bank = -torch.cat([given.query, 0.5 * given.query])
    assert torch.equal(find(given.query, bank, 6), truth(given.query, bank, 6))


def test_triton_nearest_accepts_any_strides() -> None:
    given = parity.make_inputs(20, 70, 48).to(torch.float32, torch.bfloat16)
    wide = torch.cat([given.queue, given.queue], 1)
    expected = truth(given.query, given.queue, 3)
    assert torch.equal(find(given.query.T.contiguous().T, wide[:, :48], 3), expected)
    assert torch.equal(find(given.query, given.queue.T.contiguous().T, 3), expected)
