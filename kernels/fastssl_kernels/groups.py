"""The public functions of synchronous momentum grouping (SMoG, arXiv 2207.06167)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, ops, reference
from .backend import dispatches_to_reference, requested
from .numerics import accumulation_dtype
from .rows import float_rows, reduce_rows, stack_targets

_MASK_ELEMENTS = 2**20  # of a block of the membership matrix


@dispatches_to_reference(reference.bank_cross_entropy)
def bank_cross_entropy(
    prediction: Tensor, bank: Tensor, target: Tensor, *, temperature: float, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of each row's softmax over a bank against its target entry, with a gradient to the bank too.

    Row loss: log(sum over the bank of exp(p.b / t)) - p.b[target] / t. `prediction`: [N, C]. `bank`: [K, C].
    `target`: int64 [N], or [T, N] for T targets whose losses are averaged. Dtypes, reduction and errors as in
    `info_nce`. `prediction` gets a gradient, and `bank` if it requires one: backward then reads it again, so it
    must not be overwritten before. A target outside the bank is an IndexError on a CPU and a NaN on a GPU, where
    checking would wait for the device.
    """
    checks.check_targets(prediction, bank, target)
    checks.check_temperature(temperature)
    loss, _, _ = ops.bank_cross_entropy(prediction, bank, stack_targets(target), float(temperature), requested())
    return reduce_rows(loss, reduction)


@dispatches_to_reference(reference.nearest_entry)
def nearest_entry(query: Tensor, bank: Tensor) -> Tensor:
    """Index of the bank entry with the largest dot product with each row: int64 [N]; the first of equal ones.

    Products count as computed: a matrix product may round those of two equal entries differently. A NaN counts as
    the largest product: a row of NaN gets entry 0, and every row gets the first entry of NaN.
    `query`: [N, C]. `bank`: [K, C]. Neither gets a gradient. Dtypes and errors as in `info_nce`.
    """
    checks.check_rows(("bank",), query=query, bank=bank)
    return ops.nearest(query.detach(), bank.detach(), 1, requested())[:, 0]


@dispatches_to_reference(reference.update_groups)
def update_groups(
    features: Tensor, groups: Tensor, *, momentum: float | Tensor, assignment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Assign each row to its nearest group and move the groups: g <- normalize(m g + (1 - m) mean of its rows).

    `features`: [N, C], of all ranks. `groups`: [G, C], constant. A group without rows keeps its vector;
    with a NaN in any feature, each group that has rows becomes NaN.
    `momentum`: a number in [0, 1], or a tensor [] of one, which is not looked at. `assignment`: int64 [N], the
    groups of the rows where they are known, as from an `nearest_entry` in 16 bits; rows are summed in float32.
    Returns unit groups [G, C] in float32 (float64 for float64), differentiable in `features`, and the
    assignment to the old groups, int64 [N].
    """
    checks.check_rows(features=features, groups=groups)
    checks.check_momentum(features, momentum)
    if assignment is None:
        assignment = nearest_entry(features, groups)
    checks.check_index(features, assignment=assignment)
    sums, members = _group_sums(features, assignment, len(groups))
    old = float_rows(groups, features)
    momentum = momentum if isinstance(momentum, Tensor) else float(momentum)
    moved = momentum * old + (1 - momentum) * sums / members.clamp(min=1)[:, None]
    return F.normalize(torch.where(members[:, None] > 0, moved, old), dim=1), assignment


@torch.library.custom_op("fastssl::group_sums", mutates_args=())
def _group_sums(features: Tensor, assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows of each group, and their number; a matrix product, because `index_add_` is not deterministic."""
    dtype = accumulation_dtype(features.dtype)
    sums, members = features.new_zeros(groups, features.shape[1], dtype=dtype), features.new_zeros(groups, dtype=dtype)
    checks.check_index_values("groups", sums, assignment=assignment)
    numbers = torch.arange(groups, device=features.device)[:, None]
    size = max(1, _MASK_ELEMENTS // groups)
    with torch.autocast(features.device.type, enabled=False):
        for part, chosen in zip(features.split(size), assignment.split(size), strict=True):
            mask = (numbers == chosen).to(dtype)
            sums.addmm_(mask, part.to(dtype))
            members.add_(mask.sum(1))
    return sums, members


@_group_sums.register_fake
def _(features: Tensor, assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    sums = features.new_empty(groups, features.shape[1], dtype=accumulation_dtype(features.dtype))
    return sums, sums.new_empty(groups)


def _keep_assignment(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, assignment, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = features.dtype
    ctx.save_for_backward(assignment)


def _spread(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor, None, None]:
    (assignment,) = ctx.saved_tensors
    return upstream[assignment].to(ctx.dtype), None, None


_group_sums.register_autograd(_spread, setup_context=_keep_assignment)
