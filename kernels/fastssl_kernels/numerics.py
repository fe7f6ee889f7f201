"""In which dtype the losses accumulate, and when they may take exponentials without a shift."""

from __future__ import annotations

import math

import torch

LOG2_E = math.log2(math.e)  # turns logits to base 2


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of logits, sums, loss and gradient rows."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exp_is_safe(temperature: float, entries: int) -> bool:
    """Whether a sum of `entries` terms exp(logit) of unit rows can neither overflow nor vanish in float32.

    Logits lie within 1 / temperature of 0. The margin, 0.7 in the exponent, covers rows whose norm
    was rounded away from 1.
    """
    return 1 / temperature + math.log(entries + 1) < math.floor(math.log(torch.finfo(torch.float32).max))
