"""Fused losses over a queue, and the augmentation of a batch: knows torch and Triton only."""

from . import reference
from .augment import AugmentParameters, augment
from .backend import available_backends, use_backend
from .losses import info_nce, unicon

__all__ = [
    "AugmentParameters",
    "augment",
    "available_backends",
    "info_nce",
    "reference",
    "unicon",
    "use_backend",
]
