"""Definition of a view: data only; the plan draws its random values and the executors apply them."""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGEST_SIZE = 2**14  # Pixels


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewSpec:
    """Distribution of one augmented view of an image.

    `size`: side in pixels. `scale`, `ratio`: ranges of torchvision's RandomResizedCrop (fraction of the area,
    width / height). `jitter`: (brightness, contrast, saturation, hue) as in torchvision's ColorJitter.
    `*_probability`, `grayscale`, `blur`, `solarize`, `flip`: probabilities per image. `blur_sigma`: range in pixels.
    `center_crop`: if set, the view is the central square whose side is that fraction of the short side (0.875 is the
    usual 224 out of 256), resized to `size`, without any augmentation.
    """

    size: int
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    center_crop: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.size <= LARGEST_SIZE:
            raise ValueError(
                f"a view of {self.size} pixels was asked for; size must be at least 1 and at most {LARGEST_SIZE}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {self.scale} was given; it must be 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio {self.ratio} was given; it must be 0 < low <= high, both finite")
        if not 0 <= self.blur_sigma[0] <= self.blur_sigma[1] <= LARGEST_SIZE:
            raise ValueError(f"blur_sigma {self.blur_sigma} was given; it must be 0 <= low <= high <= {LARGEST_SIZE}")
        for name in ("flip", "jitter_probability", "grayscale", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} was given; a probability lies in [0, 1]")
        if not (all(0 <= value <= 1 for value in self.jitter[:3]) and 0 <= self.jitter[3] <= 0.5):
            raise ValueError(f"jitter {self.jitter} was given; allowed are three values in [0, 1] and hue in [0, 0.5]")
        if self.center_crop is not None and not 0 < self.center_crop <= 1:
            raise ValueError(f"center_crop {self.center_crop} was given; it must lie in (0, 1]")
