"""Backward of ops whose forward pass already computed the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the gradient that a loss op returned with its loss."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[1])
    ctx.constants = len(inputs) - 1


def scale_gradient(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Scale the saved gradient by the upstream one, row by row; the op's other arguments get none."""
    constants = (None,) * ctx.constants
    if upstream is None:
        return None, *constants
    query, gradient = ctx.saved_tensors
    return once((upstream[:, None] * gradient).to(query.dtype), query), *constants


def once(gradient: Tensor, query: Tensor) -> Tensor:
    """`gradient`, through which a second derivative with respect to `query` raises."""
    return _OnceDifferentiable.apply(gradient, query)


class _OnceDifferentiable(torch.autograd.Function):
    """Tie a gradient to its input, so that a second derivative raises instead of silently lacking a term."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, query: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        raise RuntimeError('the fused losses have no second derivative; use_backend("reference") has')
