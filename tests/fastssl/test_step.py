"""The training step: accumulation, clipping, loss scaling, optimizers, the stopwatch and compilation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl.config import OptimConfig
from fastssl.errors import ConfigError
from fastssl.methods import METHODS, TrainProgress
from fastssl.presets import load
from fastssl.train.build import build_step
from fastssl.train.optim import build_optimizer
from fastssl.train.step import TrainStep, _data_parallel, joined, parts
from tests.fastssl.small_methods import BATCH, LR, VARIANTS, a_batch, build, sgd

CPU = torch.device("cpu")
# Without methods that draw random numbers per part, and heads with batch norm over a part
CUT = [
    variant
    for variant, (name, options) in VARIANTS.items()
    if not METHODS[name].Config.whole_batch and name != "unmix" and options.get("head") != "mlp-bn"
]


def train_step(method, optimizer=None, *, dtype=torch.float32, **options):
    optimizer = optimizer or sgd(method)
    return TrainStep(method, optimizer, seed=0, device=CPU, dtype=dtype, **({"compile": False} | options))


def steps(step, name, count=3, lr=LR):
    return [step(a_batch(name, index), TrainProgress(index, 50, 5), lr) for index in range(count)]


def assert_close(state, expected, tolerance=1e-5):
    for name, value in expected.items():
        torch.testing.assert_close(
            state[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("variant", CUT)
def test_parts_of_a_step_equal_the_whole(variant):
    """Split batch norm counts its groups over all parts, so each of two parts has half as many."""
    name, options = VARIANTS[variant]
    options = {**options, "shuffle": False}
    whole, cut = build(name, splits=4, **options), build(name, splits=2, **options)
    expected = steps(train_step(whole), name)
    outputs = steps(train_step(cut, accumulate=2), name)
    for output, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.loss, other.loss.detach(), rtol=1e-5, atol=1e-6)
        for metric, value in other.metrics.items():
            torch.testing.assert_close(output.metrics[metric], value, rtol=1e-4, atol=1e-5)
    statistics = ("running_", "num_batches")  # Updated once per part
    states = [
        {key: value for key, value in method.state_dict().items() if not any(word in key for word in statistics)}
        for method in (cut, whole)
    ]
    assert_close(*states)


def test_methods_that_need_the_whole_batch_refuse_parts():
    config = load("mixco-cifar10")
    with pytest.raises(ConfigError, match=r"--train\.accumulate 2 was given with mixco"):
        replace(config, train=replace(config.train, accumulate=2))


def test_parts_are_cut_and_joined_in_order():
    batch = a_batch("mocov2")
    cut = list(parts(batch, 4))
    assert [len(part.ids) for part in cut] == [BATCH // 4] * 4
    assert torch.equal(torch.cat([part.views[1] for part in cut]), batch.views[1])
    assert torch.equal(torch.cat([part.labels for part in cut]), batch.labels)
    assert all(part.views[0].is_contiguous(memory_format=torch.channels_last) for part in cut)
    method = build("mocov2")
    outputs = [method(part) for part in cut]
    labels, keys = joined(outputs).updates
    assert torch.equal(labels, batch.labels)
    assert torch.equal(keys, torch.cat([output.updates[1] for output in outputs]))


def test_a_long_gradient_is_clipped():
    free, clipped = build("mocov2"), build("mocov2")
    before = [p.clone() for p in free.query_encoder.parameters()]
    (norm,) = (output.metrics["gradient_norm"] for output in steps(train_step(free), "mocov2", 1))
    limit = float(norm) / 3
    (same,) = (output.metrics["gradient_norm"] for output in steps(train_step(clipped, clip_norm=limit), "mocov2", 1))
    assert same == norm  # The norm before clipping
    moved = [
        torch.cat([(p - old).detach().flatten() for p, old in zip(m.query_encoder.parameters(), before, strict=True)])
        for m in (free, clipped)
    ]
    assert float(moved[0].norm()) == pytest.approx(LR * float(norm), rel=1e-4)
    assert float(moved[1].norm()) == pytest.approx(LR * limit, rel=1e-3)
    torch.testing.assert_close(moved[1], moved[0] / 3, rtol=1e-3, atol=1e-7)


def test_a_scaled_loss_gives_the_gradient_of_the_loss():
    """fp16 autocast: the optimizer sees the gradient without the scale of 65536."""
    exact, scaled = build("mocov2"), build("mocov2")
    (expected,) = steps(train_step(exact), "mocov2", 1)
    step = train_step(scaled, dtype=torch.float16)
    (output,) = steps(step, "mocov2", 1)
    assert step.scaler.is_enabled()
    assert float(output.metrics["gradient_norm"]) == pytest.approx(float(expected.metrics["gradient_norm"]), rel=0.02)
    first, second = (
        method.encoder().conv1.weight.detach() - build("mocov2").encoder().conv1.weight for method in (exact, scaled)
    )
    assert (second - first).norm() < 0.05 * first.norm()


def test_an_overflow_in_fp16_leaves_the_weights_and_halves_the_scale():
    method = build("mocov2")
    step = train_step(method, dtype=torch.float16)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(method.query_encoder.state_dict())
    (output,) = steps(step, "mocov2", 1)
    assert not output.metrics["gradient_norm"].isfinite()
    assert output.loss.isfinite()
    for name, parameter in method.query_encoder.named_parameters():
        assert torch.equal(parameter, before[name])
    assert step.scaler.get_scale() == 2.0**39


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_every_optimizer_uses_the_learning_rate_of_the_step(optimizer):
    method = build("mocov2")
    step = train_step(method, build_optimizer(method, OptimConfig(optimizer=optimizer, lr=1.0, trust=0.01)))
    before = copy.deepcopy(method.query_encoder.state_dict())
    steps(step, "mocov2", 1, lr=0.0)
    assert all(torch.equal(p, before[name]) for name, p in method.query_encoder.named_parameters())
    steps(step, "mocov2", 1, lr=0.01)
    assert not any(torch.equal(p, before[name]) for name, p in method.query_encoder.named_parameters())


def test_adamw_is_torchs():
    method, twin = build("mocov2"), build("mocov2")
    config = OptimConfig(optimizer="adamw", lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, decay_norm_and_bias=False)
    steps(train_step(method, build_optimizer(method, config)), "mocov2", 2, lr=0.01)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    steps(train_step(twin, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9))), "mocov2", 2, lr=0.01)
    assert_close(method.state_dict(), twin.state_dict())


def test_the_stopwatch_has_all_parts_of_a_step():
    step = train_step(build("co2"))
    steps(step, "co2", 2)
    seconds = step.stopwatch.read()
    assert set(seconds) == {"forward", "loss", "backward", "optimizer"}
    assert all(value > 0 for value in seconds.values())
    assert step.stopwatch.read() == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mocov2", "ressl"])
def test_nothing_is_compiled_after_the_first_step(name):
    """Even though the learning rate, the step and the position in the queue change, and the queue wraps around."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    step = train_step(build(name), compile=True)
    steps(step, name, 1)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for index in range(1, 6):
        step(a_batch(name, index), TrainProgress(index, 50, 5), LR / index)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_graph_is_refused_without_a_gpu():
    config = load("quickstart")
    config = replace(config, train=replace(config.train, cuda_graph=True))
    with pytest.raises(ConfigError, match=r"--train\.cuda-graph was given with device cpu"):
        build_step(config, nn.Linear(1, 1), device=CPU, dtype=torch.float32)


class Work(TorchDispatchMode):
    """Records each op with the sizes of its inputs and outputs, except for the losses."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not (function.namespace == "fastssl" or function.is_view):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.ops.append((str(function), [tensor.numel() for tensor in tensors]))
        return result


@pytest.mark.parametrize("variant", [name for name, (method, _) in VARIANTS.items() if method != "smog"])
def test_only_the_loss_does_more_work_for_a_longer_queue(variant):
    name, options = VARIANTS[variant]
    ops = []
    for size in (4 * BATCH, 400 * BATCH):
        step = train_step(build(name, **options, queue_size=size))
        with Work() as work:
            steps(step, name, 2)
        ops.append(work.ops)
    assert len(ops[0]) > 100
    assert ops[0] == ops[1]


@pytest.fixture
def _one_rank_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank_group")
def test_gradients_of_a_compiled_method_are_exchanged_during_backward(monkeypatch):
    """There is a graph for each bucket of gradients; with a single graph, no exchange would begin before its end."""
    torch.compiler.reset()
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2000)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    method = build("mocov2")
    exchanged = _data_parallel(torch.compile(method, backend=keep))
    exchanged(a_batch("mocov2")).loss.backward()
    with_parameters = [graph for graph in graphs if any("weight" in node.name for node in graph.graph.nodes)]
    assert len(with_parameters) > 1
