"""The group update of synchronous momentum grouping (SMoG, arXiv 2207.06167)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import contract, reference
from .backend import dispatches_to_reference
from .losses import nearest_entry
from .rows import accumulation_dtype, float_rows

_MASK_ELEMENTS = 2**20  # Of a block of the membership matrix


@dispatches_to_reference(reference.update_groups)
def update_groups(
    features: Tensor, groups: Tensor, *, momentum: float | Tensor, assignment: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Assign each row to its nearest group and move the groups: g <- normalize(m g + (1 - m) mean of its rows).

    `features`: [N, C], of all ranks. `groups`: [G, C], constant. A group without rows keeps its vector; with a NaN
    in any feature, each group that has rows becomes NaN. `momentum`: a number in [0, 1], or a tensor [] of one,
    whose value is not checked. `assignment`: int64 [N], the groups of the rows if they are known, for example from
    `nearest_entry` in 16 bits. Rows are summed in float32. Returns unit groups [G, C] in float32 (float64 for
    float64), differentiable in `features`, and the assignment to the old groups, int64 [N].
    """
    contract.check_rows(features=features, groups=groups)
    contract.check_momentum(features, momentum)
    if assignment is None:
        assignment = nearest_entry(features, groups)
    contract.check_index(features, assignment=assignment)
    sums, members = _group_sums(features, assignment, len(groups))
    old = float_rows(groups, features)
    momentum = momentum if isinstance(momentum, Tensor) else float(momentum)
    moved = momentum * old + (1 - momentum) * sums / members.clamp(min=1)[:, None]
    return F.normalize(torch.where(members[:, None] > 0, moved, old), dim=1), assignment


@torch.library.custom_op("fastssl::group_sums", mutates_args=())
def _group_sums(features: Tensor, assignment: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sum and count of the rows of each group; a matrix product, because `index_add_` is not deterministic."""
    dtype = accumulation_dtype(features.dtype)
    sums, members = features.new_zeros(groups, features.shape[1], dtype=dtype), features.new_zeros(groups, dtype=dtype)
    contract.check_index_values("groups", sums, assignment=assignment)
    indices = torch.arange(groups, device=features.device)[:, None]
    size = max(1, _MASK_ELEMENTS // groups)
    with torch.autocast(features.device.type, enabled=False):
        for part, chosen in zip(features.split(size), assignment.split(size), strict=True):
            mask = (indices == chosen).to(dtype)
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
