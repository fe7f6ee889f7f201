"""Base class of the methods: modules with a pure forward and all state in buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastssl.distributed import gather_rows
from fastssl.errors import ConfigError
from fastssl.models.encoders import Encoder
from fastssl.registration import Registry
from fastssl.validation import Checked, Dim, Temperature
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec

MOST_FEATURES = 2**36  # Values in a queue or a set of groups, on all devices together
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Checked, prefix="--method."):
    """Options of every method; each method adds its own in a subclass."""

    name: ClassVar[str]
    paper: ClassVar[str]
    batch_multiple: ClassVar[int] = 1
    """Images that must stay together in a batch, on a rank and in a split of batch norm."""
    whole_batch: ClassVar[bool] = False
    """Whether an image's loss depends on the other images of its step, which then cannot be split into parts."""

    temperature: Temperature = 0.2
    """Softmax temperature of the contrastive logits."""
    dim: Dim = 128
    """Features that the head outputs."""
    queue_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of queues and other banks that are only read: 16 bits take half the memory and are faster on tensor cores.
    auto is the dtype of products (--train.precision) on a GPU and fp32 on a CPU."""

    def bank_dtype(self, device: torch.device, autocast: torch.dtype) -> torch.dtype:
        """The dtype of the banks on `device` under `autocast` (float32: none)."""
        if self.queue_dtype == "auto":
            return autocast if device.type == "cuda" else torch.float32
        return _DTYPES[self.queue_dtype]

    def check_room(self, option: str, rows: int) -> None:
        """Raise ConfigError if the `rows` feature vectors that --method.`option` asks for exceed any memory."""
        if rows * self.dim > MOST_FEATURES:
            raise ConfigError(
                f"--method.{option} {getattr(self, option.replace('-', '_'))} was given with --method.dim {self.dim}; "
                f"they need {4 * rows * self.dim / 2**30:.0f} GiB and at most {4 * MOST_FEATURES / 2**30:.0f} are "
                "allowed: lower one of them"
            )

    def check_batch(self, batch_size: int) -> None:
        """Raise ConfigError if a step of `batch_size` images, on all ranks together, does not fit the options."""
        if batch_size % self.batch_multiple:
            raise ConfigError(
                f"--train.batch-size {batch_size} was given with {self.name}, which mixes the images of a batch in "
                f"pairs; it must be a multiple of {self.batch_multiple}"
            )


class TrainProgress(NamedTuple):
    """Position of a run; `step` counts from 0, so schedules need no state.

    In a CUDA graph `step` is an int64 tensor [] on the device, which the host must not read.
    """

    step: int | Tensor
    total_steps: int
    steps_per_epoch: int

    @property
    def ends_epoch(self) -> bool:
        """Whether this step is the last of an epoch; copies a tensor `step` to the host."""
        return bool((self.step + 1) % self.steps_per_epoch == 0)


@dataclass(slots=True)
class MethodOutput:
    """`loss`: 0-dim, to be minimized. `metrics`: 0-dim tensors by name, on the device.

    `updates`: tensors without gradient that `after_step` writes into the state, such as labels and keys for a queue.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    updates: tuple[Tensor, ...]


class Method(nn.Module):
    """A contrastive method; its state_dict (parameters and persistent buffers) is its complete state."""

    Config: ClassVar[type[MethodConfig]]
    number_of_views: ClassVar[int]
    uses_labels: ClassVar[bool] = False
    follows_length: ClassVar[bool] = False
    """Whether a step depends on the total number of steps other than by its learning rate."""
    capturable: ClassVar[bool] = True
    """Whether `after_step` may be part of a CUDA graph, because it depends only on state on the device."""
    small_options: ClassVar[Mapping[str, Any]] = {}
    """Options that make the method small enough for a test; queue_size, bank_size, dim and the like are set anyway."""
    small_views: ClassVar[tuple[int, ...]] = ()
    """Pixels of the views in such a test; by default 16 for each of `number_of_views`."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By a short description, options with which the contract tests run again; a subclass does not inherit them."""

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
        """Raise ConfigError if the views do not fit the method."""
        if len(views) != cls.number_of_views:
            raise ConfigError(
                f"{len(views)} views were given to {cls.Config.name}, which takes {cls.number_of_views}; "
                "change `views` of the preset"
            )

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Fill state from the batches of one epoch, before the first step of a run; by default do nothing."""

    def forward(self, batch: Batch) -> MethodOutput:
        """Loss and metrics of a batch: tensor code with static shapes and no side effect except batch norm's."""
        raise NotImplementedError

    def after_step(self, output: MethodOutput, progress: TrainProgress) -> None:
        """Update momentum encoder and queue after the optimizer's step, without waiting for the device."""
        raise NotImplementedError

    def gather_keys(self, keys: Tensor) -> Tensor:
        """The keys of all ranks, without gradient, in the banks' dtype."""
        return gather_rows(keys.to(self.bank_dtype))

    def encoder(self) -> nn.Module:
        """The module that is evaluated and exported: images to features, without the head."""
        raise NotImplementedError


METHODS: Registry[type[Method]] = Registry("method")
_Registered = TypeVar("_Registered", bound=type[Method])


def register_method(cls: _Registered) -> _Registered:
    """Class decorator: make a method available under `Config.name`.

    ConfigError if that name is taken, and for a Config without `name` or `paper`.
    """
    for attribute in ("name", "paper"):
        if not isinstance(getattr(getattr(cls, "Config", None), attribute, None), str):
            raise ConfigError(f"method class {cls.__qualname__} was given without a text as Config.{attribute}; add it")
    METHODS.register(cls.Config.name, cls, cls)
    return cls
