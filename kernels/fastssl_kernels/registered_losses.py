"""Our losses, registered, with how each is called; imported by the package."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import groups, losses, reference
from .loss_registry import BACKENDS, LOSSES, Inputs, pair_arguments, register_loss

__all__ = ["LOSSES"]


def _labeled(given: Inputs, temperature: float) -> dict[str, Any]:
    labels = {"query_labels": given.query_labels, "queue_labels": given.queue_labels}
    return pair_arguments(given, temperature) | labels


def _with_positive(given: Inputs, temperature: float) -> dict[str, Any]:
    return pair_arguments(given, temperature) | {"include_positive": True}


def _two_teachers(given: Inputs, temperature: float) -> dict[str, Any]:
    return {
        "query": given.query,
        "teacher": torch.stack([given.key, given.second_key]),
        "queue": given.queue,
        "temperature": temperature,
        "teacher_temperature": 0.6 * temperature,
        "reduction": "none",
    }


def _mixed_keys(given: Inputs, temperature: float) -> dict[str, Any]:
    return {
        "query": given.query,
        "keys": given.key,
        "queue": given.queue,
        "first": torch.arange(len(given.query), device=given.query.device),
        "second": given.partner,
        "weight": given.weight,
        "temperature": temperature,
        "reduction": "none",
    }


def _two_keys(given: Inputs, temperature: float) -> dict[str, Any]:
    return {
        "query": given.query,
        "first_key": given.key,
        "second_key": given.second_key,
        "queue": given.queue,
        "weight": given.weight,
        "temperature": temperature,
        "reduction": "none",
    }


def _bank(given: Inputs, temperature: float) -> dict[str, Any]:
    return {"query": given.query, "bank": given.queue, "temperature": temperature}


def _targets(given: Inputs, temperature: float) -> dict[str, Any]:
    rows = {"prediction": given.query, "bank": given.queue, "target": given.target}
    return {**rows, "temperature": temperature, "reduction": "none"}


def _moved_groups(given: Inputs, _: float) -> dict[str, Any]:
    return {"features": _settled(given.query, given.queue, 1), "groups": given.queue, "momentum": 0.9}


def _neighbors(given: Inputs, _: float) -> dict[str, Any]:
    k = min(5, len(given.queue))
    key = _settled(given.key, given.queue, k)
    return {"query": given.query, "key": key, "queue": given.queue, "k": k, "reduction": "none"}


def _settled(rows: Tensor, bank: Tensor, count: int) -> Tensor:
    """`rows`, replacing each whose `count` nearest entries depend on rounding to 16 bits by the least ambiguous row.

    The loss of such a row jumps within rounding, so its error says nothing about the implementation.
    """
    if count == len(bank):
        return rows
    similarities = (rows.detach().double() @ bank.double().T).topk(count + 1, dim=1).values
    gap = similarities[:, -2] - similarities[:, -1]
    own = torch.arange(len(rows), device=rows.device)
    # Rounding one side of two products of unit rows to bfloat16 changes their difference by 0.002 / sqrt(C)
    return rows[torch.where(gap > 2**-6 / rows.shape[1] ** 0.5, own, gap.argmax())]


def _views(given: Inputs, temperature: float) -> dict[str, Any]:
    return {"first": given.query, "second": given.key, "temperature": temperature, "reduction": "none"}


def _labeled_views(given: Inputs, temperature: float) -> dict[str, Any]:
    return _views(given, temperature) | {"labels": given.query_labels}


_register = partial(register_loss, backends=BACKENDS)

_register("queue_read", losses.queue_read, reference.queue_read, _bank)
_register("info_nce", losses.info_nce, reference.info_nce)
_register("unicon", losses.unicon, reference.unicon, _labeled)
_register("sup_con", losses.sup_con, reference.sup_con, _labeled)
_register("soft_cross_entropy", losses.soft_cross_entropy, reference.soft_cross_entropy, _two_teachers, difference=True)
_register("consistency", losses.consistency, reference.consistency, difference=True)
_register("consistency+positive", losses.consistency, reference.consistency, _with_positive, difference=True)
_register("mixco", losses.mixco, reference.mixco, _mixed_keys)
_register("unmix", losses.unmix, reference.unmix, _two_keys)
_register(
    "bank_cross_entropy",
    losses.bank_cross_entropy,
    reference.bank_cross_entropy,
    _targets,
    gradients=("query", "queue"),
)
_register("update_groups", groups.update_groups, reference.update_groups, _moved_groups, timed=False)
_register("mean_shift", losses.mean_shift, reference.mean_shift, _neighbors, timed=False)
_register("nt_xent", losses.nt_xent, reference.nt_xent, _views, gradients=("query", "key"), in_batch=True)
_register(
    "nt_xent+labels", losses.nt_xent, reference.nt_xent, _labeled_views, gradients=("query", "key"), in_batch=True
)
