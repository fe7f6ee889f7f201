"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from fastssl.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, *, total_steps: int, steps_per_epoch: int) -> float:
    """The learning rate at `step`, 0 <= step < total_steps.

    "cosine-epoch" changes once per epoch, lr * (1 + cos(pi * epoch / epochs)) / 2, as in the official MoCo code.
    """
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * step / warmup
    if optim.schedule == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in optim.milestones)
        return optim.lr * 0.1**passed
    if optim.schedule == "cosine-epoch":
        step = step // steps_per_epoch * steps_per_epoch
    progress = (step - warmup) / max(1, total_steps - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, progress)))
    return optim.final_lr + (optim.lr - optim.final_lr) * fall
