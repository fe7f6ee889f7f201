"""Backward without torch's engine, which asks a driver for streams wherever a tensor says that it is on a GPU.

The nodes are torch's own and in an order that the engine could take; `install` puts the walk in place of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Place = tuple[Any, int]  # A node and the index of its input in backward, as in `Tensor.grad_fn` and `output_nr`


@contextmanager
def install() -> Iterator[None]:
    """Inside the `with` block, Tensor.backward and torch.autograd.grad use this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", backward)
        patch.setattr(torch.autograd, "grad", grad)
        patch.setattr(FunctionCtx, "set_materialize_grads", _set_materialize_grads)
        yield


def backward(loss: Tensor) -> None:
    """Like Tensor.backward() of a scalar."""
    _walk([(_place(loss), torch.ones_like(loss))], set())


def grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None], **_: Any
) -> tuple[Tensor | None, ...]:
    """Like torch.autograd.grad with `allow_unused`."""
    given = grad_outputs or [None] * len(outputs)
    roots = [
        (_place(output), torch.ones_like(output) if upstream is None else upstream)
        for output, upstream in zip(outputs, given, strict=True)
    ]
    places = [_place(each) for each in inputs]
    found = _walk(roots, set(places))
    return tuple(found.get(place) for place in places)


def _place(tensor: Tensor) -> Place:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


@torch.no_grad()
def _walk(roots: list[tuple[Place, Tensor]], wanted: set[Place]) -> dict[Place, Tensor]:
    """Gradients at the wanted places, where the walk ends; without any, adds gradients to the leaves."""
    waiting = _edges_into({node for (node, _), _ in roots})
    upstream: dict[Any, dict[int, Tensor]] = {}
    for place, gradient in roots:
        _add(upstream, place, gradient)
    found: dict[Place, Tensor] = {}
    ready = [node for node in upstream if not waiting[node]]
    while ready:
        node = ready.pop()
        given = upstream.pop(node, {})
        reached = {(node, at): gradient for at, gradient in given.items() if (node, at) in wanted}
        found |= reached
        results = _apply(node, {} if reached else given, accumulate=not wanted)
        for (following, at), result in zip(node.next_functions, results, strict=False):
            if following is None:
                continue
            if result is not None:
                _add(upstream, (following, at), result)
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
    return found


def _edges_into(roots: set[Any]) -> Counter[Any]:
    edges: Counter[Any] = Counter()
    seen, stack = set(roots), list(roots)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                edges[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    return edges


def _add(upstream: dict[Any, dict[int, Tensor]], place: Place, gradient: Tensor) -> None:
    node, at = place
    metadata = node._input_metadata[at]
    # The engine does these two for the formulas
    gradient = gradient.sum_to_size(metadata.shape).to(metadata.dtype)
    sums = upstream.setdefault(node, {})
    sums[at] = sums[at] + gradient if at in sums else gradient


def _apply(node: Any, given: dict[int, Tensor], *, accumulate: bool) -> Sequence[Tensor | None]:
    """The gradients that a node passes on; none if it received none."""
    leaf = hasattr(node, "variable")
    if leaf and accumulate and given:
        node.variable.grad = given[0] if node.variable.grad is None else node.variable.grad + given[0]
    if leaf or not given:
        return [None] * len(node.next_functions)
    about = node._input_metadata
    arguments = [given.get(at) for at in range(len(about))]
    if callable(node):
        results = node(*arguments)
    else:  # An autograd.Function
        if not getattr(node, "takes_none", False):
            arguments = [_zeros(about[at]) if x is None else x for at, x in enumerate(arguments)]
        results = node.apply(*arguments)
    return results if isinstance(results, tuple) else (results,)


def _set_materialize_grads(ctx: Any, value: bool) -> None:
    ctx.materialize_grads = value  # It cannot be read back
    ctx.takes_none = not value


def _zeros(about: Any) -> Tensor:
    return torch.zeros(about.shape, dtype=about.dtype, device=about.device)
