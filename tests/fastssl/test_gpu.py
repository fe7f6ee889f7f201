"""Every method on a GPU: it computes what the CPU computes, and its steps never wait for the device."""

from __future__ import annotations

import copy

import pytest
import torch

from fastssl.methods import Clock
from fastssl.train.step import TrainStep
from fastssl_pipelines.batch import Batch
from tests.fastssl.small_methods import STEPS_PER_EPOCH, TOTAL_STEPS, VARIANTS, a_batch, build, sgd

pytestmark = pytest.mark.gpu
DRAWS_NUMBERS = ("mixco", "unmix")  # the generators of CPU and GPU differ


def on_gpu(batch: Batch) -> Batch:
    views = tuple(view.cuda() for view in batch.views)
    return Batch(views=views, labels=batch.labels.cuda(), ids=batch.ids.cuda(), step=batch.step)


@pytest.mark.parametrize("variant", [name for name, (method, _) in VARIANTS.items() if method not in DRAWS_NUMBERS])
def test_the_loss_and_gradient_are_those_of_the_cpu(variant):
    name, options = VARIANTS[variant]
    method, batch = build(name, "local", **options), a_batch(name)
    twin = copy.deepcopy(method).cuda()
    losses = [method(batch).loss, twin(on_gpu(batch)).loss]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-4)
    expected, gradient = (each.encoder().conv1.weight.grad.cpu() for each in (method, twin))
    assert (gradient - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_does_not_wait_for_the_device(variant):
    """Also not the last step of an epoch, in which SMoG makes new groups."""
    name, options = VARIANTS[variant]
    method = build(name, **options).cuda()
    step = TrainStep(method, sgd(method), seed=0, device=torch.device("cuda"), dtype=torch.bfloat16, compile=False)
    batches = [on_gpu(a_batch(name, number)) for number in range(2 * STEPS_PER_EPOCH)]
    for batch in batches[:STEPS_PER_EPOCH]:
        step(batch, Clock(batch.step, TOTAL_STEPS, STEPS_PER_EPOCH), 0.01)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[STEPS_PER_EPOCH:]:
            output = step(batch, Clock(batch.step, TOTAL_STEPS, STEPS_PER_EPOCH), 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.loss.isfinite()
