"""The public primitive of which the losses are closed forms."""

from __future__ import annotations

from torch import Tensor

from . import checks, ops, reference
from .backend import dispatches_to_reference, requested
from .rows import QueueRead


@dispatches_to_reference(reference.queue_read)
def queue_read(query: Tensor, bank: Tensor, *, temperature: float) -> QueueRead:
    """Logsumexp of q.m / t over a bank, and the bank's mean weighted by the softmax of q.m / t.

    `query`: [N, C]. `bank`: [K, C], constant. Dtypes and errors as in `info_nce`. Returns `lse` [N] and
    `mean` [N, C] in float32 (float64 for float64). Both are differentiable in `query`; backward reads the
    bank again, so it must not be overwritten before. The gradient of `lse` is mean / t.
    """
    checks.check_rows(query=query, bank=bank)
    checks.check_temperature(temperature)
    return QueueRead(*ops.queue_read(query, bank, float(temperature), requested()))
