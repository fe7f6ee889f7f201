"""The public loss of a batch against itself, with a gradient to both sides of each pair."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, ops, reference
from .backend import dispatches_to_reference, requested
from .rows import reduce_rows


@dispatches_to_reference(reference.nt_xent)
def nt_xent(
    first: Tensor, second: Tensor, *, temperature: float, labels: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Normalized cross-entropy of two views of a batch (SimCLR, arXiv 2002.05709), or SupCon in a batch.

    The 2N rows are those of `first`, then those of `second`, both [N, C] and of one dtype. Row loss:
    log(sum over the other 2N - 1 rows of exp(x.y / t)) - x.(the other view) / t. With `labels`, int64 [N],
    -1 = unknown, all other rows of a known label are positives and the second term is their mean: the
    supervised contrastive loss (arXiv 2004.11362, eq. 2), without a factor t / base temperature. A label
    below -1 is a ValueError on a CPU, and NaN in all rows elsewhere, where looking would wait for the device.

    The mean is over the 2N rows; reduction "none" gives [2N]. Both views get a gradient; backward reads its
    own copy of them again. Dtypes and errors as in `info_nce`.
    """
    checks.check_views(first, second, labels)
    checks.check_temperature(temperature)
    rows = torch.cat([first, second])
    own = torch.arange(len(first), device=first.device)
    classes = own if labels is None else labels
    loss, *_ = ops.nt_xent(rows, classes.repeat(2), float(temperature), requested())
    return reduce_rows(loss, reduction)
