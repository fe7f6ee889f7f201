"""Backward of ops whose forward pass already made the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the gradient that a loss op returned next to its loss."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])
    ctx.constants = len(inputs) - 1


def scale_gradient(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """The saved gradient times the upstream one, row by row; nothing to the op's other arguments."""
    constants = (None,) * ctx.constants
    if upstream is None:
        return None, *constants
    query, gradient = ctx.saved_tensors
    return once((upstream[:, None] * gradient).to(query.dtype), query), *constants


def once(gradient: Tensor, query: Tensor) -> Tensor:
    """`gradient`, which a second derivative with respect to `query` refuses to pass."""
    return _OnceDifferentiable.apply(gradient, query)


class _OnceDifferentiable(torch.autograd.Function):
    """Ties a gradient to its input: a second derivative raises, where it would silently lack a term."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, query: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError('the fused losses have no second derivative; use_backend("reference") has')
