"""Batch normalization for contrastive pretraining: local, synchronized or split, and the shuffle of a batch.

A key encoder that shares batch statistics with the query can recognize the positive by them alone. MoCo (He et al.,
2020, section 3.3) therefore splits the statistics and shuffles the key batch. On several ranks local and split
statistics are those of a rank; `averaged_statistics` averages the running statistics over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from fastssl.apex import apex_group_norm
from fastssl.distributed import gather_rows, mean_over_ranks, rank, world_size

NormLayer = Callable[[int], nn.Module]
GROUPS = 32  # Of group norm


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics come from `splits` parts of the batch, as if each part were on its own GPU.

    Input [N, C, H, W], N divisible by `splits` while training (ValueError otherwise); the affine parameters are shared.
    After a pass the running statistics are the mean of the splits' updated ones; in eval() it is ordinary batch norm.
    Keys and shapes of the state dict are those of nn.BatchNorm2d.

    Definition: SplitBatchNorm of MoCo's CIFAR-10 notebook. There sample i is in split i mod S, here in split
    i // (N/S): the order of samples is random anyway, and contiguous parts of a channels_last batch need no copies (1.3
    to 3.4 times faster on a CPU).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_features: int, splits: int) -> None:
        super().__init__(num_features)
        if splits < 1:
            raise ValueError(f"splits {splits} was given; a batch has at least 1 split")
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if input.shape[0] % self.splits:
            raise ValueError(
                f"a batch of {input.shape[0]} was given to batch norm in {self.splits} splits; "
                "choose a batch size that is a multiple of splits"
            )
        # The compiler would unroll the loop: thousands of launches, and minutes to compile a ResNet-50
        parts = _all_at_once if torch.compiler.is_compiling() else _one_by_one
        output, means, variances = parts(self, input)
        self.running_mean.copy_(means)
        self.running_var.copy_(variances)
        self.num_batches_tracked.add_(1)
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"


def _one_by_one(norm: SplitBatchNorm2d, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, running mean and running variance after a pass; torch's batch norm for each part of the batch."""
    means, variances = norm.running_mean.repeat(norm.splits, 1), norm.running_var.repeat(norm.splits, 1)
    parts = [
        batch_norm(part, mean, variance, norm.weight, norm.bias, True, norm.momentum, norm.eps)
        for part, mean, variance in zip(input.chunk(norm.splits), means, variances, strict=True)
    ]
    return torch.cat(parts), means.mean(0), variances.mean(0)


def _all_at_once(norm: SplitBatchNorm2d, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_one_by_one`, in operations over all parts that the compiler fuses."""
    output, mean, variance = _SplitNormalization.apply(input, norm.weight, norm.bias, norm.splits, norm.eps)
    count = input.numel() // mean.numel()
    # torch 2.11 compiles them as if they had a gradient; the running statistics would then keep the whole step alive
    mean, variance = mean.detach(), variance.detach()
    unbiased = variance * (count / (count - 1))
    return (
        output,
        norm.running_mean.lerp(mean.mean(0), norm.momentum),
        norm.running_var.lerp(unbiased.mean(0), norm.momentum),
    )


class _SplitNormalization(torch.autograd.Function):
    """Batch norm [N, C, H, W] of each of `splits` parts of a batch, and the parts' mean and variance [splits, C].

    The gradient is written out, as autograd through mean and variance needs 1.5 times as many launches.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, splits: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = _parts(input, splits)
        variance, mean = torch.var_mean(rows, _WITHIN_A_PART, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(input, weight, mean, scale)
        output = (rows - mean) * (scale * _channels(weight)) + _channels(bias)
        mean, variance = mean.flatten(1), variance.flatten(1)
        ctx.mark_non_differentiable(mean, variance)
        return output.flatten(0, 1).to(input.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        input, weight, mean, scale = ctx.saved_tensors
        normalized = (_parts(input, len(mean)) - mean) * scale
        gradient = _parts(upstream, len(mean))
        total = gradient.sum(_WITHIN_A_PART, keepdim=True)
        along = (gradient * normalized).sum(_WITHIN_A_PART, keepdim=True)
        count = input.numel() // mean.numel()
        of_input = (gradient - total / count - normalized * (along / count)) * (scale * _channels(weight))
        of_weight, of_bias = (part.sum(0).flatten().to(weight.dtype) for part in (along, total))
        return of_input.flatten(0, 1).to(input.dtype), of_weight, of_bias, None, None


_WITHIN_A_PART = (1, 3, 4)  # Dimensions of [splits, N / splits, C, H, W]


def _parts(batch: Tensor, splits: int) -> Tensor:
    """The batch as [splits, N / splits, C, H, W] in float32 or float64."""
    return batch.unflatten(0, (splits, -1)).to(torch.promote_types(batch.dtype, torch.float32))


def _channels(values: Tensor) -> Tensor:
    """[C] as [C, 1, 1]."""
    return values[:, None, None]


class SyncBatchNorm(nn.SyncBatchNorm):
    """Batch norm over the rows of all ranks: nn.SyncBatchNorm, and its equal for CPU tensors, which that refuses.

    Input [N, C] or [N, C, ...] with the same N on all ranks; a backward pass sums the gradients of all ranks' losses.
    Keys and shapes of the state dict are those of nn.BatchNorm2d.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        among_ranks = dist.is_available() and dist.is_initialized()
        if not (self.training and input.is_cpu and among_ranks):
            return super().forward(input)
        rows = input.to(torch.promote_types(input.dtype, torch.float32))
        others = [dim for dim in range(rows.ndim) if dim != 1]
        channels = [1, -1] + [1] * (rows.ndim - 2)
        mean = _MeanOverRanks.apply(rows.mean(others))
        centered = rows - mean.view(channels)
        variance = _MeanOverRanks.apply(centered.square().mean(others))
        normalized = centered * torch.rsqrt(variance + self.eps).view(channels)
        if self.affine:
            normalized = normalized * self.weight.view(channels) + self.bias.view(channels)
        with torch.no_grad():
            count = rows.numel() // len(mean) * world_size()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        return normalized.to(input.dtype)


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return mean_over_ranks(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return mean_over_ranks(upstream)


def convert_to_sync(module: nn.Module) -> nn.Module:
    """Replace every nn.BatchNorm1d and nn.BatchNorm2d in `module` by a `SyncBatchNorm`, and return `module`.

    If `module` itself is one, return its replacement. Parameters and buffers stay the same tensors. Split batch norm
    and other subclasses stay unchanged.
    """
    for name, child in module.named_children():
        setattr(module, name, convert_to_sync(child))
    if type(module) is nn.BatchNorm1d or type(module) is nn.BatchNorm2d:
        sync = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
        sync._parameters, sync._buffers = module._parameters, module._buffers
        return sync.train(module.training)
    return module


@contextmanager
def averaged_statistics(module: nn.Module) -> Iterator[Tensor]:
    """Inside the `with` block every batch norm in `module` has the mean over ranks of its running statistics.

    Yields the statistics of each rank, as `gather_statistics` returns them, and restores them afterwards. A running
    statistic is linear in those of the batches, so N ranks with S/N splits each then equal one rank with S splits. All
    ranks must enter; one collective.
    """
    before = gather_statistics(module)
    load_statistics(module, before.mean(0).expand(world_size(), -1))
    yield before
    load_statistics(module, before)


@torch.no_grad()
def gather_statistics(module: nn.Module) -> Tensor:
    """The running statistics of all batch norms in `module`, [ranks, statistics]; all ranks must call it."""
    own = [buffer.flatten() for buffer in _running_statistics(module)]
    return gather_rows(torch.cat(own)[None] if own else torch.empty(1, 0))


@torch.no_grad()
def load_statistics(module: nn.Module, statistics: Tensor) -> None:
    """Set this rank's running statistics from what `gather_statistics` returned on the same number of ranks."""
    buffers = _running_statistics(module)
    if buffers:
        rows = statistics[rank()].to(buffers[0].device).split([buffer.numel() for buffer in buffers])
        torch._foreach_copy_(buffers, list(rows))


def _running_statistics(module: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in module.named_buffers() if name.endswith(("running_mean", "running_var"))]


def norm_layer(name: str, splits: int = 8) -> NormLayer:
    """Constructor `channels -> module` of the norm called `name`; "split" is batch norm in `splits` groups.

    Group norm has 32 groups (Wu and He, arXiv 1803.08494), or gcd(32, channels). ValueError for an unknown name.
    """
    layers: dict[str, NormLayer] = {
        "local": nn.BatchNorm2d,
        "split": partial(SplitBatchNorm2d, splits=splits),
        "sync": SyncBatchNorm,
        "group": lambda channels: nn.GroupNorm(math.gcd(GROUPS, channels), channels),
        "apex-group": lambda channels: apex_group_norm(math.gcd(GROUPS, channels), channels),
    }
    if name not in layers:
        raise ValueError(f"norm {name!r} was given; allowed are {', '.join(layers)}")
    return layers[name]


def inverse_permutation(permutation: Tensor) -> Tensor:
    """The inverse int64 [N] of `permutation`: `x[permutation][inverse_permutation(permutation)]` is x."""
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.shape[0], device=permutation.device)
    return inverse
