"""One training step: forward, backward, optimiser, momentum update and queue."""

from __future__ import annotations

import torch

from fastssl.config import TrainConfig
from fastssl.errors import ConfigError
from fastssl.methods import Clock, Method, MethodOutput
from fastssl_pipelines.batch import Batch


def choose_device(config: TrainConfig) -> torch.device:
    """The device to train on; "auto" takes CUDA where there is a GPU. ConfigError for a GPU that is not there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--train.device cuda was given and torch finds no GPU here; `fastssl doctor` tells more")
    return torch.device(config.device)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 by itself; without that, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The autocast dtype; fp32 means no autocast."""
    if config.precision == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def seed_step(seed: int, step: int) -> None:
    """Put torch's generators into the state that belongs to a step, the same on all ranks."""
    # SplitMix64's odd constant spreads neighbouring (seed, step) pairs over all seeds
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)


class TrainStep:
    """Callable that trains a method on one batch; weights, optimiser and queue change in place.

    All torch randomness of a step follows from (seed, step), so a resumed run draws what the first one would have.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        compile: bool,
    ):
        self.method, self.optimizer, self.seed = method, optimizer, seed
        self.autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        self.forward = torch.compile(method, dynamic=False) if compile else method

    def __call__(self, batch: Batch, clock: Clock, lr: float) -> MethodOutput:
        seed_step(self.seed, clock.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.autocast:
            output = self.forward(batch)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(output, clock)
        return output
