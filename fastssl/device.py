"""Chooses the device and the precision of a run from its options and the hardware."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from fastssl.config import TrainConfig
from fastssl.distributed import local_rank
from fastssl.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TENSOR_CORES = (7, 0)  # Lowest compute capability with fast fp16 products


def choose_device(config: TrainConfig) -> torch.device:
    """The device to train on, a GPU with its index; "auto" prefers CUDA, and each rank gets its own GPU.

    ConfigError for a GPU that does not exist.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--train.device cuda was given and torch finds no GPU here; `fastssl doctor` shows details")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = local_rank(), torch.cuda.device_count()
    if index >= count:
        raise ConfigError(
            f"at least {index + 1} processes were started on this machine, which has {count} GPUs; give torchrun "
            f"--nproc-per-node {count} or add --train.device cpu"
        )
    return torch.device("cuda", index)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware supports bf16; emulated, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The autocast dtype; float32 means no autocast. "auto" takes bf16, else fp16, if the device is fast at it."""
    if config.precision != "auto":
        return _DTYPES[config.precision]
    if has_fast_bf16(device):
        return torch.bfloat16
    fast_fp16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _TENSOR_CORES
    return torch.float16 if fast_fp16 else torch.float32


class Numerics(NamedTuple):
    """The autocast dtype, and a description of the precision for the user."""

    dtype: torch.dtype
    text: str


def set_numerics(config: TrainConfig, device: torch.device) -> Numerics:
    """Choose the autocast dtype, and configure cuDNN and TF32 accordingly for this process.

    TF32 products are allowed only with --train.precision tf32. cuDNN benchmarks its algorithms at the first step unless
    --train.deterministic is on, which bit-for-bit repeatable runs on a GPU need.
    """
    dtype = choose_dtype(config, device)
    name = f"{dtype}".removeprefix("torch.") + (" autocast" if dtype != torch.float32 else "")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it, before its first product
    torch.use_deterministic_algorithms(config.deterministic)
    if device.type == "cpu":
        return Numerics(dtype, name)
    tf32 = config.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not config.deterministic
    cudnn = "deterministic algorithms" if config.deterministic else "cuDNN picks the fastest algorithms"
    return Numerics(dtype, f"{name}, TF32 {'on' if tf32 else 'off'}, {cudnn}")
