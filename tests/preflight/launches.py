"""What torch.compile launches on an H100 in one pass of an encoder forward and back, counted without one.

    python -m tests.preflight.launches resnet50 --size 224 --norm split

Inductor writes the code for a GPU that is not there, and its launches are counted in that code.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch._inductor import config
from torch._inductor.graph import GraphLowering

from fastssl.models.encoders import build_encoder
from fastssl.models.norm import norm_layer
from tests.preflight.driver import installed
from tests.preflight.fake_cuda import DEVICE, fake_cuda

_TRITON = re.compile(r"^\s+triton_\w+\.run\(", re.MULTILINE)
_EXTERN = re.compile(r"\bextern_kernels\.\w+\(|= torch\.ops\.aten\.\w+\.\w+\(")
_SPLITS = 8


class Launches(NamedTuple):
    """Of one compiled graph."""

    triton: int
    """Kernels that Inductor wrote."""
    library: int
    """Calls of cuDNN and cuBLAS, some of which launch several."""
    nodes: int
    """Of the graph that was lowered: what the time to compile follows."""

    @property
    def total(self) -> int:
        return self.triton + self.library


def count(module: nn.Module, images: Tensor, dtype: torch.dtype = torch.bfloat16) -> dict[str, Launches]:
    """Launches "forward" and "backward" of a module on the fake device, in a `compiling` block."""
    with _recorded() as found, torch.autocast("cuda", dtype):
        torch.compile(module, fullgraph=True, dynamic=False)(images).sum().backward()
    return found


@contextmanager
def compiling() -> Iterator[None]:
    """Inside the `with` block torch.compile compiles for an H100 that is not there; no code that it writes can run."""
    # folding evaluates constants on the device, and what a cache holds is not lowered
    options = config.patch(fx_graph_cache=False, compile_threads=1, joint_graph_constant_folding=False)
    _forget()
    try:
        with installed("sm_90"), fake_cuda(), options, functorch.patch(enable_autograd_cache=False):
            yield
    finally:
        _forget()


def _forget() -> None:
    """What torch remembers of this machine, such as that it has no GPU for Triton, is asked for again."""
    torch.compiler.reset()
    for found in vars(torch.utils._triton).values():
        if hasattr(found, "cache_clear"):
            found.cache_clear()


@contextmanager
def _recorded() -> Iterator[dict[str, Launches]]:
    found: dict[str, Launches] = {}

    def compile_to_module(graph: GraphLowering) -> Any:
        code = graph.codegen()[0].value
        nodes = len(graph.module.graph.nodes)
        found["backward" if graph.is_backward else "forward"] = Launches(
            len(_TRITON.findall(code)), len(_EXTERN.findall(code)), nodes
        )
        call: Callable[[list[Tensor]], Any] = lambda inputs: graph.module(*inputs)  # noqa: E731
        return SimpleNamespace(call=call, __file__="not written", runner=None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphLowering, "compile_to_module", compile_to_module)
        yield found


def of_encoder(
    name: str, *, size: int, norm: str, batch: int = 256, blocks: tuple[int, ...] = ()
) -> dict[str, Launches]:
    """Launches of an encoder in bf16 on square images; up to 64 pixels it has the stem for small ones.

    `blocks` keeps that many blocks of each stage of a ResNet; empty keeps all of them.
    """
    stem = "small" if size <= 64 else "imagenet"
    with compiling():
        encoder = build_encoder(name, stem=stem, norm_layer=norm_layer(norm, _SPLITS))
        for index, kept in enumerate(blocks, start=1):
            setattr(encoder, f"layer{index}", getattr(encoder, f"layer{index}")[:kept])
        encoder = encoder.to(DEVICE).to(memory_format=torch.channels_last)
        shape = (batch, 3, size, size)
        images = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last)
        return count(encoder, images)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.preflight.launches", description=__doc__.split("\n")[0])
    parser.add_argument("encoder", help="such as resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--norm", action="append", help="batch norm, may be given again (default: local and split)")
    parser.add_argument("--batch", type=int, default=256, help="images (default: %(default)s)")
    given = parser.parse_args()
    row = "{:10} {:8} {:>8} {:>8} {:>6} {:>6}".format
    print(f"{given.encoder}, {given.size} pixels, {given.batch} images, torch {torch.__version__}")
    print(row("norm", "pass", "triton", "library", "total", "nodes"))
    for norm in given.norm or ["local", "split"]:
        for part, found in of_encoder(given.encoder, size=given.size, norm=norm, batch=given.batch).items():
            print(row(norm, part, found.triton, found.library, found.total, found.nodes), flush=True)


if __name__ == "__main__":
    main()
