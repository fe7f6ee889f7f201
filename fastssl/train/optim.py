"""Optimisers."""

from __future__ import annotations

import torch
from torch import nn

from fastssl.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD over every parameter that learns, batch norm and biases included, as in the official MoCo code."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
