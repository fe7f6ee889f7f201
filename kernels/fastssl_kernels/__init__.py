"""Fused losses over a queue, and batch augmentation; depends on torch and Triton only."""

from . import reference
from .augment_images import augment
from .augment_parameters import AugmentParameters
from .backend import available_backends, use_backend
from .groups import update_groups
from .loss_registry import Inputs, register_loss, unregister_loss
from .losses import (
    bank_cross_entropy,
    consistency,
    info_nce,
    mean_shift,
    mixco,
    nearest_entry,
    nt_xent,
    queue_read,
    soft_cross_entropy,
    sup_con,
    unicon,
    unmix,
)
from .ops import watch_losses
from .registered_losses import LOSSES
from .rows import QueueRead

__all__ = [
    "LOSSES",
    "AugmentParameters",
    "Inputs",
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
    "register_loss",
    "soft_cross_entropy",
    "sup_con",
    "unicon",
    "unmix",
    "unregister_loss",
    "update_groups",
    "use_backend",
    "watch_losses",
]
