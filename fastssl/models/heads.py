"""Projection heads, from an encoder's features to the space of the contrastive loss."""

from __future__ import annotations

from torch import nn


class LinearHead(nn.Linear):
    """One linear layer: [B, in_dim] to [B, out_dim]. MoCo v1 and MoCo's CIFAR-10 recipe."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)


class MLPHead(nn.Sequential):
    """Linear, ReLU, linear, without batch norm: [B, in_dim] to [B, out_dim]. MoCo v2."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(nn.Linear(in_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, out_dim))


class MLPBatchNormHead(nn.Sequential):
    """Linear, batch norm, ReLU, linear: [B, in_dim] to [B, out_dim]. As in SimCLR and MoCo v3."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        hidden = (
            nn.Linear(in_dim, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
        )
        super().__init__(*hidden, nn.Linear(hidden_dim, out_dim))


class ProjectionHead(nn.Sequential):
    """Linear, batch norm, ReLU, linear, batch norm without scale and shift: [B, in_dim] to [B, out_dim]. SMoG."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(
            *MLPBatchNormHead(in_dim, hidden_dim, out_dim),
            nn.BatchNorm1d(out_dim, affine=False),
        )


def build_head(kind: str, in_dim: int, hidden_dim: int, out_dim: int) -> nn.Module:
    """Build the head called "linear" (without hidden layer), "mlp" or "mlp-bn"; ValueError for other names."""
    if kind == "linear":
        return LinearHead(in_dim, out_dim)
    if kind == "mlp":
        return MLPHead(in_dim, hidden_dim, out_dim)
    if kind == "mlp-bn":
        return MLPBatchNormHead(in_dim, hidden_dim, out_dim)
    raise ValueError(f"head {kind!r} was given; allowed are linear, mlp, mlp-bn")
