"""A whole training step of every method on a fake GPU: nothing waits for it, and every tensor is where it belongs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastssl.methods import Clock
from fastssl.train.build import build_method, build_step
from tests.fastssl.small_methods import VARIANTS, a_batch, build
from tests.preflight import backward
from tests.preflight.fake_cuda import DEVICE, Ops, Waits, fake_cuda
from tests.preflight.recipes import DTYPES, IMAGENET, SMALL, batch_on_gpu, recipe

STEPS_PER_EPOCH = 100  # enough images for the groups of SMoG
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in IMAGENET]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", [*SMALL, *SLOW])
def test_a_step_stays_on_the_device(name: str, precision: str) -> None:
    """The last two steps of an epoch, after which SMoG makes new groups; momentum exists from the first on."""
    config = recipe(name, precision)
    with fake_cuda():
        method = build_method(config, DEVICE)
        step = build_step(config, method, device=DEVICE, dtype=DTYPES[precision])
        state = described(method.state_dict())
        for number in (STEPS_PER_EPOCH - 2, STEPS_PER_EPOCH - 1):
            with Ops() as ops:
                output = step(batch_on_gpu(config, number), Clock(number, 2 * STEPS_PER_EPOCH, STEPS_PER_EPOCH), 0.1)
    scalars = {"loss": output.loss, **output.metrics}
    assert described(scalars) == {key: (torch.Size([]), torch.float32, DEVICE) for key in scalars}
    assert {rows.device for rows in output.kept} == {DEVICE}
    assert not any(rows.requires_grad for rows in output.kept)
    assert described(method.state_dict()) == state
    banks = {value.dtype for key, value in method.state_dict().items() if key.endswith(".keys")}
    assert banks == {DTYPES[precision]}
    learning = {key: value for key, value in method.named_parameters() if value.requires_grad}
    assert described({key: value.grad for key, value in learning.items()}) == described(learning)
    assert {value.dtype for value in learning.values()} == {torch.float32}
    assert sum(ops.counts.values()) > 100


def described(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
    return {name: (value.shape, value.dtype, value.device) for name, value in tensors.items()}


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x + 1),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.zeros(3).to(x.device),
    "copy from the host": lambda x: x.copy_(torch.zeros(3)),
    "two devices": lambda x: x + torch.zeros(3),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_waits_for_the_device_is_seen(case: str) -> None:
    with fake_cuda(), Ops():
        x = torch.zeros(3, device=DEVICE)
        with pytest.raises((Waits, RuntimeError, torch._subclasses.fake_tensor.DynamicOutputShapeException)):
            WAITS[case](x)


def test_ops_that_launch_are_counted() -> None:
    with fake_cuda():
        x = torch.zeros(3, device=DEVICE)
        with Ops() as ops:
            (x.view(1, 3) + torch.empty_like(x)).detach().mul_(2)
    assert ops.counts == {"add": 1, "mul_": 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_walk_is_torchs_own_backward(variant: str) -> None:
    name, options = VARIANTS[variant]
    method, batch = build(name, **options), a_batch(name)
    twin = copy.deepcopy(method)
    torch.manual_seed(3)
    method(batch).loss.backward()
    torch.manual_seed(3)
    with backward.install():
        twin(batch).loss.backward()
    gradients = gradients_of(twin)
    assert gradients.keys() == gradients_of(method).keys()
    for key, expected in gradients_of(method).items():
        # where several meet they are added in another order
        torch.testing.assert_close(gradients[key], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.grad for key, value in module.named_parameters() if value.grad is not None}
