"""LARS (You et al., arXiv 1708.03888) over lists of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-8


class LARS(torch.optim.Optimizer):
    """SGD with momentum; each parameter tensor p has its gradient scaled so that a step is proportional to |p|.

    rate = trust * |p| / (|g| + weight_decay * |p| + eps), or 1 where |p| or |g| is 0; then
    buffer = momentum * buffer + rate * (g + weight_decay * p) and p = p - lr * buffer.
    This is LARC without clipping, as in SwAV and SMoG: every tensor is scaled, including batch norm and biases. The
    norms stay on the device, and so does a GradScaler's `found_inf`, which skips the step.
    """

    _step_supports_amp_scaling = True  # Without it, GradScaler reads found_inf on the host

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust: float,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update([p for p in group["params"] if p.grad is not None], group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        gradients = [p.grad for p in params if p.grad is not None]
        rates = _rates(params, gradients, trust=group["trust"], weight_decay=group["weight_decay"])
        updates = torch._foreach_add(gradients, params, alpha=group["weight_decay"])
        torch._foreach_mul_(updates, rates)
        # The rest is SGD with momentum, whose fused kernel changes nothing if a scaled loss overflowed
        torch._fused_sgd_(
            params,
            updates,
            [self._buffer(p) for p in params] if group["momentum"] else [],
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
            found_inf=getattr(self, "found_inf", None),
        )

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def _rates(params: list[Tensor], gradients: list[Tensor], *, trust: float, weight_decay: float) -> list[Tensor]:
    """The rate for each tensor, 0-dim."""
    size = torch.stack(torch._foreach_norm(params))
    slope = torch.stack(torch._foreach_norm(gradients))
    rate = trust * size / (slope + weight_decay * size + EPS)
    return list(torch.where((size > 0) & (slope > 0), rate, 1.0).unbind())
