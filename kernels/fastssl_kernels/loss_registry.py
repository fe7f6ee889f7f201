"""Every loss by name, with what parity, `fastssl verify` and the benchmarks need to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("triton", "blockwise")


@dataclass
class Inputs:
    """Arguments from which every loss can be called; `parity.make_inputs` makes them, with unit rows."""

    query: Tensor
    """[N, C]"""
    key: Tensor
    """[N, C]: also the first teacher, or the second view."""
    second_key: Tensor
    """[N, C]: also the second teacher."""
    queue: Tensor
    """[K, C]: also the bank, or the groups."""
    query_labels: Tensor
    """int64 [N]"""
    queue_labels: Tensor
    """int64 [K]"""
    target: Tensor
    """int64 [2, N], indices into the queue."""
    partner: Tensor
    """int64 [N], indices into the keys."""
    weight: Tensor
    """[N], in [0, 1]"""

    def to(self, rows: torch.dtype, queue: torch.dtype, device: torch.device | str = "cpu") -> Inputs:
        """A copy with the queue in one dtype and all other rows in another."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        floating = {name: x.to(rows) for name, x in moved.items() if x.is_floating_point()}
        return Inputs(**{**moved, **floating, "queue": moved["queue"].to(queue)})


Arguments = Callable[[Inputs, float], dict[str, Any]]


@dataclass(frozen=True)
class Loss:
    """A registered loss; see `register_loss`."""

    function: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: Arguments
    gradients: tuple[str, ...]
    backends: tuple[str, ...]
    difference: bool
    in_batch: bool
    tolerances: Mapping[torch.dtype, tuple[float, float]]
    timed: bool

    def call(self, given: Inputs, temperature: float) -> tuple[Tensor, ...]:
        """The floating-point outputs of the public function, unreduced."""
        return _floating(self.function(**self.arguments(given, temperature)))

    def define(self, given: Inputs, temperature: float) -> tuple[Tensor, ...]:
        """The floating-point outputs of the reference, unreduced."""
        return _floating(self.reference(**self.arguments(given, temperature)))


LOSSES: dict[str, Loss] = {}
"""Every registered loss by name; a part after "+" names a variant."""


def pair_arguments(given: Inputs, temperature: float) -> dict[str, Any]:
    """Query, key and queue, unreduced: the arguments of `info_nce`."""
    pair = {"query": given.query, "key": given.key, "queue": given.queue}
    return {**pair, "temperature": temperature, "reduction": "none"}


def register_loss(
    name: str,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Arguments = pair_arguments,
    *,
    gradients: tuple[str, ...] = ("query",),
    backends: tuple[str, ...] = ("blockwise",),
    difference: bool = False,
    in_batch: bool = False,
    tolerances: Mapping[torch.dtype, tuple[float, float]] | None = None,
    timed: bool = True,
) -> None:
    """Register a loss, ours or a plug-in's, for `parity`, `fastssl verify NAME` and the benchmarks.

    `function`: the public function. `reference`: its definition in plain torch, in any dtype including float64,
    with the same arguments. Both return a tensor of rows, or a tuple of tensors. `arguments`: builds the keyword
    arguments of both from `Inputs` and a temperature, with reduction "none" if there is a reduction.

    `gradients`: the fields of `Inputs` that get a gradient. `backends`: "blockwise" for plain torch, "triton" for a
    function that `use_backend("triton")` runs on Triton kernels. `difference`: the loss is a difference of two
    softmaxes' means, which amplifies rounding. `in_batch`: the rows are the bank, and have its dtype. `tolerances`:
    relative errors allowed of loss and gradient, by dtype of the queue, in place of `parity.tolerances`. `timed`:
    False where `arguments` takes longer than the loss.

    Raises ValueError if the name is taken, or for an unknown field or backend.
    """
    if name in LOSSES:
        raise ValueError(
            f'a loss named "{name}" is registered already; register under another name or call unregister_loss first'
        )
    known = [field.name for field in fields(Inputs)]
    if not gradients or not set(gradients) <= set(known):
        raise ValueError(f"gradients of {name} are {gradients}; they must be fields of Inputs: {', '.join(known)}")
    if not backends or not set(backends) <= set(BACKENDS):
        raise ValueError(f"backends of {name} are {backends}; they must be some of {', '.join(BACKENDS)}")
    LOSSES[name] = Loss(
        function, reference, arguments, gradients, backends, difference, in_batch, tolerances or {}, timed
    )


def unregister_loss(name: str) -> None:
    """Remove a registered loss; ValueError if no loss has that name."""
    if name not in LOSSES:
        raise ValueError(f'no loss is named "{name}"; the registered ones are {", ".join(LOSSES)}')
    del LOSSES[name]


def _floating(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(x for x in outputs if x.is_floating_point())
