"""What every method is: a module whose forward is pure and whose buffers are its whole state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.distributed import gather_rows
from fastssl.errors import ConfigError
from fastssl.models.encoders import Encoder
from fastssl.validation import Checked, Dim, Temperature
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec

MOST_FEATURES = 2**36  # numbers of a queue or of a set of groups, on all devices together
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Checked, prefix="--method."):
    """Options that every method has; a method's own configuration adds to them."""

    name: ClassVar[str]
    paper: ClassVar[str]
    batch_multiple: ClassVar[int] = 1
    """Images that must stay together in a batch, on a rank and in a split of batch norm."""
    whole_batch: ClassVar[bool] = False
    """Whether the loss of an image depends on the others of its step, so that it cannot be cut into parts."""

    temperature: Temperature = 0.2
    """Softmax temperature of the contrastive logits."""
    dim: Dim = 128
    """Features that the head gives to the loss."""
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Numbers of queues and other banks that are only read: 16 bits halve them, and tensor cores read them faster. auto
    is the dtype of products (--train.precision) on a GPU and fp32 on a CPU."""

    def bank_dtype(self, device: torch.device, autocast: torch.dtype) -> torch.dtype:
        """The dtype of the banks on `device` under `autocast` (float32: none)."""
        if self.queue_dtype == "auto":
            return autocast if device.type == "cuda" else torch.float32
        return _DTYPES[self.queue_dtype]

    def check_room(self, option: str, rows: int) -> None:
        """Raise ConfigError where `rows` features, as many as --method.`option` asks for, are beyond any memory."""
        if rows * self.dim > MOST_FEATURES:
            raise ConfigError(
                f"--method.{option} {getattr(self, option.replace('-', '_'))} was given with --method.dim {self.dim}; "
                f"they ask for {4 * rows * self.dim / 2**30:.0f} GiB and at most {4 * MOST_FEATURES / 2**30:.0f} are "
                "allowed: lower one of them"
            )

    def check_batch(self, batch_size: int) -> None:
        """Raise ConfigError where a step of `batch_size` images, all ranks together, does not fit the options."""
        if batch_size % self.batch_multiple:
            raise ConfigError(
                f"--train.batch-size {batch_size} was given with {self.name}, which mixes the images of a batch in "
                f"pairs; it must be a multiple of {self.batch_multiple}"
            )


class TrainProgress(NamedTuple):
    """Where a run is: `step` counts from 0, what follows from it needs no state of its own.

    In a CUDA graph `step` is an int64 tensor [] on the device, which the host must not read.
    """

    step: int | Tensor
    total_steps: int
    steps_per_epoch: int

    @property
    def ends_epoch(self) -> bool:
        """Whether this step is the last of an epoch; reads a `step` that is a tensor."""
        return bool((self.step + 1) % self.steps_per_epoch == 0)


@dataclass(slots=True)
class MethodOutput:
    """`loss`: 0-dim, to be minimized. `metrics`: 0-dim tensors by name, left on the device.

    `kept`: what the method's own `after_step` takes in, without gradient; keys and labels for a queue.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    kept: tuple[Tensor, ...]


class Method(nn.Module):
    """A contrastive method; its state_dict (parameters and persistent buffers) is the whole truth about it."""

    Config: ClassVar[type[MethodConfig]]
    number_of_views: ClassVar[int]
    uses_labels: ClassVar[bool] = False
    follows_length: ClassVar[bool] = False
    """Whether a step depends on the number of steps of the run, beyond its learning rate."""
    capturable: ClassVar[bool] = True
    """Whether `after_step` may be part of a CUDA graph: what it does follows from state on the device alone."""

    def __init__(
        self,
        encoder: Encoder,
        config: MethodConfig,
        views: tuple[ViewSpec, ...],
        bank_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.check_views(views)
        self.views, self.bank_dtype = views, bank_dtype

    @classmethod
    def check_views(cls, views: tuple[ViewSpec, ...]) -> None:
        """Raise ConfigError for a view list that does not fit the method."""
        if len(views) != cls.number_of_views:
            raise ConfigError(
                f"{len(views)} views were given to {cls.Config.name}, which takes {cls.number_of_views}; "
                "change `views` of the preset"
            )

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Fill state from the batches of one epoch, before the first step of a run; most methods take none."""

    def forward(self, batch: Batch) -> MethodOutput:
        """Loss and metrics of a batch: tensor code with static shapes and no side effect but batch norm's own."""
        raise NotImplementedError

    def after_step(self, output: MethodOutput, progress: TrainProgress) -> None:
        """Momentum update and queue after the optimizer's step, without waiting for the device."""
        raise NotImplementedError

    def gather_keys(self, keys: Tensor) -> Tensor:
        """The keys of all ranks, as constants in the banks' dtype."""
        return gather_rows(keys.to(self.bank_dtype))

    def encoder(self) -> nn.Module:
        """The part that is evaluated and exported: images to features, without the head."""
        raise NotImplementedError
