"""What every method is: a module whose forward is pure and whose buffers are its whole state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fastssl.errors import ConfigError
from fastssl.models.encoders import Encoder
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options that every method has; a method's own configuration adds to them."""

    name: ClassVar[str]
    paper: ClassVar[str]

    temperature: float = 0.2
    """Softmax temperature of the contrastive logits."""
    dim: int = 128
    """Features that the head gives to the loss."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"--method.temperature {self.temperature} was given; it must be above 0")
        if self.dim < 1:
            raise ConfigError(f"--method.dim {self.dim} was given; it must be at least 1")


@dataclass(slots=True)
class MethodOutput:
    """`loss`: 0-dim, to be minimised. `metrics`: 0-dim tensors by name, left on the device.

    `keys` [N, C] unit rows and `labels` [N] are what `after_step` puts into the queue.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    keys: Tensor
    labels: Tensor


class Method(nn.Module):
    """A contrastive method; its state_dict (parameters and persistent buffers) is the whole truth about it."""

    Config: ClassVar[type[MethodConfig]]
    number_of_views: ClassVar[int]
    uses_labels: ClassVar[bool] = False

    def __init__(self, encoder: Encoder, config: MethodConfig, views: tuple[ViewSpec, ...]):
        super().__init__()
        if len(views) != self.number_of_views:
            raise ConfigError(
                f"{len(views)} views were given to {self.Config.name}, which takes {self.number_of_views}; "
                "change `views` of the preset"
            )
        self.views = views

    def forward(self, batch: Batch) -> MethodOutput:
        """Loss and metrics of a batch: tensor code with static shapes and no side effect but batch norm's own."""
        raise NotImplementedError

    def after_step(self, output: MethodOutput, step: int) -> None:
        """Momentum update and queue after the optimiser's step, without waiting for the device."""
        raise NotImplementedError

    def encoder(self) -> nn.Module:
        """The part that is evaluated and exported: images to features, without the head."""
        raise NotImplementedError
