"""Fused losses over a queue, and the augmentation of a batch: knows torch and Triton only."""

from . import reference
from .augment import AugmentParameters, augment
from .backend import available_backends, use_backend
from .groups import bank_cross_entropy, nearest_entry, update_groups
from .in_batch import nt_xent
from .losses import consistency, info_nce, mean_shift, mixco, soft_cross_entropy, sup_con, unicon, unmix
from .ops import watch_losses
from .read import queue_read
from .rows import QueueRead

__all__ = [
    "AugmentParameters",
    "QueueRead",
    "augment",
    "available_backends",
    "bank_cross_entropy",
    "consistency",
    "info_nce",
    "mean_shift",
    "mixco",
    "nearest_entry",
    "nt_xent",
    "queue_read",
    "reference",
    "soft_cross_entropy",
    "sup_con",
    "unicon",
    "unmix",
    "update_groups",
    "use_backend",
    "watch_losses",
]
