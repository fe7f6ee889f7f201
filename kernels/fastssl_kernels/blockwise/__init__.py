"""The losses streamed over blocks of the bank in plain torch: any device, any dtype, no N x K tensor.

The functions that `ops` calls, by the names that `triton.losses` has too.
"""

from .bank import bank_cross_entropy_rows, bank_gradient, nearest, nt_xent_rows, queue_read, queue_read_gradient
from .losses import (
    consistency_rows,
    info_nce_rows,
    mean_shift_rows,
    mixco_rows,
    soft_cross_entropy_rows,
    sup_con_rows,
    unicon_rows,
    unmix_rows,
)

__all__ = [
    "bank_cross_entropy_rows",
    "bank_gradient",
    "consistency_rows",
    "info_nce_rows",
    "mean_shift_rows",
    "mixco_rows",
    "nearest",
    "nt_xent_rows",
    "queue_read",
    "queue_read_gradient",
    "soft_cross_entropy_rows",
    "sup_con_rows",
    "unicon_rows",
    "unmix_rows",
]
