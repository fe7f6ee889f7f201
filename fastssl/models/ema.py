"""The momentum encoder: a frozen copy that follows a module by an exponential moving average."""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def momentum_copy(module: Module) -> Module:
    """A copy of `module`, including buffers, whose parameters require no gradient."""
    return deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update_(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """Move every parameter of `target` to momentum * target + (1 - momentum) * source, in place.

    `target` is a `momentum_copy` of `source`. Buffers stay unchanged: the batch-norm statistics of a momentum encoder
    come from its own forward passes (MoCo, He et al., 2020). Does not wait for the device. ValueError for a momentum
    outside [0, 1] and for parameters of different shapes.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum {momentum} was given; it must lie in [0, 1]")
    targets: list[Tensor] = list(target.parameters())
    sources: list[Tensor] = list(source.parameters())
    if [parameter.shape for parameter in targets] != [parameter.shape for parameter in sources]:
        raise ValueError(
            f"a target of {len(targets)} parameters and a source of {len(sources)} were given, "
            "and their shapes differ; the target must be a momentum_copy of the source"
        )
    torch._foreach_lerp_(targets, sources, 1 - momentum)
