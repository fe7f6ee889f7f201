"""The device and the numbers that a run computes with, chosen from its options and from what is here."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from fastssl.config import TrainConfig
from fastssl.distributed import local_rank
from fastssl.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TENSOR_CORES = (7, 0)  # compute capability from which fp16 products are fast


def choose_device(config: TrainConfig) -> torch.device:
    """The device to train on, a GPU with its number; "auto" takes CUDA where there is one, each rank its own.

    ConfigError for a GPU that is not there.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--train.device cuda was given and torch finds no GPU here; `fastssl doctor` tells more")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    number, count = local_rank(), torch.cuda.device_count()
    if number >= count:
        raise ConfigError(
            f"{number + 1} processes or more were started on this machine and it has {count} GPUs; give torchrun "
            f"--nproc-per-node {count} or add --train.device cpu"
        )
    return torch.device("cuda", number)


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 by itself; without that, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The autocast dtype; float32 means no autocast. "auto": bf16, else fp16, where the device is fast in it."""
    if config.precision != "auto":
        return _DTYPES[config.precision]
    if has_fast_bf16(device):
        return torch.bfloat16
    fast_fp16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _TENSOR_CORES
    return torch.float16 if fast_fp16 else torch.float32


class Numerics(NamedTuple):
    """What `set_numerics` chose, for the user to read."""

    dtype: torch.dtype
    text: str


def set_numerics(config: TrainConfig, device: torch.device) -> Numerics:
    """Choose the autocast dtype and set cuDNN and TF32 accordingly, for this process.

    fp32 is exact: TF32 products are allowed with --train.precision tf32 alone (in autocast few are left). cuDNN times
    its algorithms at the first step, unless --train.deterministic is on, which is needed to repeat a run bit for bit
    on a GPU.
    """
    dtype = choose_dtype(config, device)
    name = f"{dtype}".removeprefix("torch.") + (" autocast" if dtype != torch.float32 else "")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first product
    torch.use_deterministic_algorithms(config.deterministic)
    if device.type == "cpu":
        return Numerics(dtype, name)
    tf32 = config.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not config.deterministic
    cudnn = "deterministic algorithms" if config.deterministic else "cuDNN picks the fastest algorithms"
    return Numerics(dtype, f"{name}, TF32 {'on' if tf32 else 'off'}, {cudnn}")
