"""What the losses accept; every refusal says what was given and what is allowed."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "none")
_UNIT_TOLERANCE = 1e-2  # above the rounding of a unit row to bfloat16


def check_rows(query: Tensor, key: Tensor, queue: Tensor) -> None:
    """query and key [N, C], queue [K, C]; floating dtypes, one device, gradient to the query only."""
    for name, rows in {"query": query, "key": key, "queue": queue}.items():
        if rows.dtype not in DTYPES:
            raise TypeError(f"{name} has dtype {rows.dtype}; allowed are float64, float32, bfloat16 and float16")
        if (rows.dtype == torch.float64) != (query.dtype == torch.float64):
            raise TypeError(f"{name} has dtype {rows.dtype} and query {query.dtype}; float64 does not mix, convert all")
        if rows.ndim != 2 or 0 in rows.shape:
            raise ValueError(
                f"{name} has shape {list(rows.shape)}; it must be a non-empty matrix with one vector a row"
            )
        if rows.device != query.device:
            raise ValueError(f"{name} is on {rows.device} and query on {query.device}; move them to one device")
    if key.shape != query.shape:
        raise ValueError(f"key has shape {list(key.shape)}; it must have the query's, {list(query.shape)}")
    if queue.shape[1] != query.shape[1]:
        raise ValueError(
            f"queue has shape {list(queue.shape)}; it must be [K, {query.shape[1]}], one key a row, "
            f"for a query of shape {list(query.shape)}"
        )
    for name, rows in {"key": key, "queue": queue}.items():
        if rows.requires_grad:
            raise ValueError(f"{name} requires grad, but only query gets a gradient; pass {name}.detach()")


def check_labels(query: Tensor, queue: Tensor, query_labels: Tensor, queue_labels: Tensor) -> None:
    """One int64 label a row, on the rows' device."""
    pairs = {"query": (query, query_labels), "queue": (queue, queue_labels)}
    for name, (rows, labels) in pairs.items():
        if labels.dtype != torch.int64:
            raise TypeError(f"{name}_labels has dtype {labels.dtype}; it must be int64, with -1 for unknown")
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"{name}_labels has shape {list(labels.shape)}; it must be [{rows.shape[0]}], one a row")
        if labels.device != query.device:
            raise ValueError(
                f"{name}_labels is on {labels.device} and query on {query.device}; move them to one device"
            )


def check_options(temperature: float, reduction: str) -> None:
    """A positive finite number as temperature and a known reduction."""
    if isinstance(temperature, Tensor):
        raise TypeError("temperature is a tensor; it must be a number, because it gets no gradient")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction is "{reduction}"; it must be "mean" or "none"')


def check_unit_rows(query: Tensor, key: Tensor, queue: Tensor) -> None:
    """In debug mode (FASTSSL_DEBUG=1) refuse rows that are not L2-normalised; it waits for the device."""
    if os.environ.get("FASTSSL_DEBUG") != "1":
        return
    for name, rows in {"query": query, "key": key, "queue": queue}.items():
        error = (torch.linalg.vector_norm(rows.float(), dim=1) - 1).abs().max().item()
        if not error < _UNIT_TOLERANCE:
            raise ValueError(f"{name} has a row whose norm is off 1 by {error:.3g}; use F.normalize(rows, dim=1)")
