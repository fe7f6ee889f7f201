"""torch.compile on a fake GPU: a method is one graph each way, without work for the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import TorchDynamoException
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from fastssl_pipelines.batch import Batch
from tests.fastssl.small_methods import VARIANTS, a_batch, build
from tests.preflight.fake_cuda import DEVICE, fake_cuda
from tests.preflight.recipes import DTYPES

LOSSES = {"smog": "bank_cross_entropy", "ressl": "soft_cross_entropy", "msvq": "soft_cross_entropy"}
LOSSES |= {"unimoco": "unicon", "supcon": "sup_con"}
# In fp16 a method for each loss
CASES = [(variant, "bf16") for variant in VARIANTS] + [(name, "fp16") for name in ("mocov2", "supcon", "ressl", "smog")]


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "precision"), CASES)
def test_a_method_is_one_graph_on_the_device(variant: str, precision: str) -> None:
    name, options = VARIANTS[variant]
    dtype = DTYPES[precision]
    with fake_cuda():
        method = build(name, bank_dtype=dtype, **options).to(DEVICE)
        graphs, output = compiled(method, on_device(a_batch(name), dtype), dtype)
    assert len(graphs) == 2
    assert output.loss.dtype == torch.float32
    for graph in graphs:
        assert {value.device for node in graph.graph.nodes for value in values_of(node)} == {DEVICE}
    names = {str(node.target) for node in graphs[0].graph.nodes}
    assert f"fastssl.{LOSSES.get(name, 'info_nce')}.default" in names
    products = {
        value.dtype
        for graph in graphs
        for node in graph.graph.nodes
        if "convolution" in str(node.target)
        for value in values_of(node)
    }
    assert products == {dtype}


def compiled(method: nn.Module, batch: Batch, dtype: torch.dtype) -> tuple[list[fx.GraphModule], Any]:
    """The graphs of a step, forward and backward, and its output."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    with torch.autocast("cuda", dtype):
        output = torch.compile(method, fullgraph=True, dynamic=False, backend=backend)(batch)
    output.loss.backward()
    torch.compiler.reset()
    return graphs, output


def values_of(node: fx.Node) -> list[Tensor]:
    return [value for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]


def on_device(batch: Batch, dtype: torch.dtype) -> Batch:
    views = tuple(view.to(DEVICE, dtype) for view in batch.views)
    return Batch(views=views, labels=batch.labels.to(DEVICE), ids=batch.ids.to(DEVICE), step=batch.step)


class Looks(nn.Module):
    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        self.look(x)
        return x * 2


@pytest.mark.parametrize(
    "look", [lambda x: print(x.sum().item()), lambda x: x.nonzero(), lambda x: bool(x.sum() > 0) or 1]
)
def test_a_graph_that_breaks_is_refused(look: Callable[[Tensor], Any]) -> None:
    torch.compiler.reset()
    with fake_cuda(), pytest.raises((TorchDynamoException, DynamicOutputShapeException)):
        torch.compile(Looks(look), fullgraph=True, backend="eager")(torch.ones(3, device=DEVICE))
