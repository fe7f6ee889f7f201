"""Every method on a GPU computes the same as on a CPU, and its steps never wait for the device."""

from __future__ import annotations

import copy

import pytest
import torch

from fastssl.config import OptimConfig, TrainConfig
from fastssl.device import set_numerics
from fastssl.methods import TrainProgress
from fastssl.observe.meter import StepMeter
from fastssl.train.optim import build_optimizer
from fastssl.train.step import TrainStep
from fastssl_pipelines.batch import Batch
from tests.fastssl.small_methods import STEPS_PER_EPOCH, TOTAL_STEPS, VARIANTS, a_batch, build

pytestmark = pytest.mark.gpu
DRAWS_NUMBERS = ("mixco", "unmix")  # The generators of CPU and GPU differ
OPTIMIZERS = (OptimConfig(lr=0.01, momentum=0.9), OptimConfig(optimizer="lars", lr=0.1), OptimConfig(optimizer="adamw"))


@pytest.fixture(autouse=True)
def exact_fp32():
    """As in a run; torch's default is TF32 convolutions."""
    set_numerics(TrainConfig(device="cuda", precision="fp32"), torch.device("cuda"))


def on_gpu(batch: Batch) -> Batch:
    views = tuple(view.cuda() for view in batch.views)
    return Batch(views=views, labels=batch.labels.cuda(), ids=batch.ids.cuda(), step=batch.step)


@pytest.mark.parametrize("variant", [name for name, (method, _) in VARIANTS.items() if method not in DRAWS_NUMBERS])
def test_loss_and_gradient_equal_the_cpus(variant):
    name, options = VARIANTS[variant]
    method, batch = build(name, "local", **options), a_batch(name)
    twin = copy.deepcopy(method).cuda()
    losses = [method(batch).loss, twin(on_gpu(batch)).loss]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    expected, gradient = (each.encoder().conv1.weight.grad.cpu() for each in (method, twin))
    assert (gradient - expected).norm() <= 1e-2 * expected.norm()


def a_step(method, dtype=torch.bfloat16, optim=OPTIMIZERS[0], **options):
    options = {"seed": 0, "device": torch.device("cuda"), "dtype": dtype, "compile": False, **options}
    return TrainStep(method, build_optimizer(method, optim), **options)


def train(step, batches, meter=None):
    for batch in batches:
        output = step(batch, TrainProgress(batch.step, TOTAL_STEPS, STEPS_PER_EPOCH), 0.01)
        if meter:
            meter.add(batch, output)
    return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_does_not_wait_for_the_device(variant, dtype):
    """Including the last step of an epoch, in which SMoG recomputes its groups."""
    name, options = VARIANTS[variant]
    step = a_step(build(name, **options).cuda(), dtype, clip_norm=1.0)
    meter = StepMeter(step.stopwatch, scaled=False)
    batches = [on_gpu(a_batch(name, index)) for index in range(2 * STEPS_PER_EPOCH)]
    train(step, batches[:STEPS_PER_EPOCH])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = train(step, batches[STEPS_PER_EPOCH:], meter)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.loss.isfinite()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_trains_like_a_plain_step(variant, compile):
    """With the same random numbers, and without traces of the warm-ups."""
    name, options = VARIANTS[variant]
    if compile and name in DRAWS_NUMBERS:
        pytest.skip("compiled code draws other numbers")
    assert_a_graph_trains_the_same(name, options, compile=compile)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda optim: optim.optimizer)
def test_a_graph_works_with_every_optimizer(optim, dtype):
    """And in float16 with the scaler, which adjusts the loss scale in the first steps."""
    assert_a_graph_trains_the_same("mocov2", {}, dtype, optim=optim)


def assert_a_graph_trains_the_same(name, options, dtype=torch.float32, **more):
    batches = [on_gpu(a_batch(name, index)) for index in range(STEPS_PER_EPOCH + 2)]
    states = []
    for cuda_graph in (False, True):
        method = build(name, **options).cuda()
        step = a_step(method, dtype, cuda_graph=cuda_graph, **more)
        train(step, batches)
        states.append(method.state_dict())
        assert set(step.stopwatch.read()) >= ({"graph"} if cuda_graph else {"forward", "loss", "backward", "optimizer"})
    exact = dtype == torch.float32
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4 if exact else 1e-2, atol=1e-5 if exact else 1e-3)
