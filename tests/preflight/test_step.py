"""A complete training step of every method on a fake GPU: nothing waits for it, and every tensor stays on it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastssl.methods import METHODS, TrainProgress
from fastssl.train import cuda_graph as graph
from fastssl.train.build import build_method, build_step
from tests.fastssl.small_methods import VARIANTS, a_batch, build
from tests.preflight import backward
from tests.preflight.fake_cuda import DEVICE, Event, Ops, Waits, fake_cuda
from tests.preflight.recipes import DTYPES, IMAGENET, SMALL, batch_on_gpu, recipe

END = 99  # The last step of an epoch, with enough images for SMoG's groups
# fp16 adds the loss scale: one method with SGD, one with groups, one with two key encoders, and one ResNet-50
IN_FP16 = ("mocov2", "smog", "msvq")
STEPS = [*((name, "bf16") for name in (*SMALL, *IMAGENET)), *((name, "fp16") for name in (*IN_FP16, "mocov2-imagenet"))]
GRAPHS = [*((name, "bf16") for name in METHODS), ("mocov2", "fp16")]
FAST = (("mocov2", "bf16"), ("smog", "bf16"))


def cases(every: list[tuple[str, str]]) -> list[Any]:
    """All cases, those that are not needed while working marked slow."""
    return [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in every]


# Ops after backward: gradient norm, optimizer, momentum update and queue. SMoG has two banks, and groups.
LATE = {"bf16": 12, "fp16": 21}
LATE_SMOG = {"bf16": 16, "fp16": 25}


@pytest.mark.parametrize(("name", "precision"), cases(STEPS))
def test_a_step_stays_on_the_device(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two steps of an epoch, after which SMoG recomputes its groups."""
    config = recipe(name, precision)
    with fake_cuda():
        method = build_method(config, DEVICE)
        state = described(method.state_dict())
        # Undone before the `with` block around it ends, which has replaced the same function
        with Ops() as ops, monkeypatch.context() as patch:
            patch.setattr(Tensor, "backward", lambda loss: (backward.backward(loss), ops.counts.clear()))
            step = build_step(config, method, device=DEVICE, dtype=DTYPES[precision])
            step(batch_on_gpu(config, END - 1), TrainProgress(END - 1, 2 * END, END + 1), 0.1)
            late = sum(ops.counts.values())
            output = step(batch_on_gpu(config, END), TrainProgress(END, 2 * END, END + 1), 0.1)
    scalars = {"loss": output.loss, **output.metrics}
    assert described(scalars) == {key: (torch.Size([]), torch.float32, DEVICE) for key in scalars}
    assert {rows.device for rows in output.updates} == {DEVICE}
    assert not any(rows.requires_grad for rows in output.updates)
    assert described(method.state_dict()) == state
    banks = {value.dtype for key, value in method.state_dict().items() if key.endswith(".keys")}
    assert banks == {DTYPES[precision]}
    learning = {key: value for key, value in method.named_parameters() if value.requires_grad}
    assert described({key: value.grad for key, value in learning.items()}) == described(learning)
    assert {value.dtype for value in learning.values()} == {torch.float32}
    if config.optim.optimizer == "sgd":  # One launch per parameter group
        budget = (LATE_SMOG if config.method.name == "smog" else LATE)[precision]
        assert 5 <= late <= budget + len(step.optimizer.param_groups) - 1


@pytest.mark.parametrize(("name", "precision"), cases(GRAPHS))
def test_a_step_in_a_graph_stays_on_the_device(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The captured step never waits, and later steps pass only the batch, the step index and the learning rate."""
    config = recipe(name, precision)
    config = replace(config, train=replace(config.train, cuda_graph=True))
    monkeypatch.setattr(graph, "_WARM_UPS", 0)
    with fake_cuda():
        method = build_method(config, DEVICE)
        with Ops() as ops:
            step = build_step(config, method, device=DEVICE, dtype=DTYPES[precision])
            with monkeypatch.context() as capture:
                capture.setattr(Event, "synchronize", lambda _: None)  # The stopwatch waits for earlier events
                step(batch_on_gpu(config, 0), TrainProgress(0, 2 * END, END), 0.1)
            captured = Counter(ops.counts)
            ops.counts.clear()
            step(batch_on_gpu(config, 1), TrainProgress(1, 2 * END, END), 0.1)
    assert captured["_fused_sgd_"] == 2  # One from its construction
    assert captured["_foreach_lerp_"] == (2 if name == "msvq" else 1)
    handed_over = len(config.views) + 2 + 2
    assert sum(ops.counts.values()) <= handed_over + (0 if method.capturable else LATE_SMOG[precision])


def described(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
    return {name: (value.shape, value.dtype, value.device) for name, value in tensors.items()}


WAITS = {
    "synchronize": lambda _: torch.cuda.synchronize(),
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
def test_waiting_for_the_device_is_detected(case: str) -> None:
    with fake_cuda(), Ops():
        x = torch.zeros(3, device=DEVICE)
        with pytest.raises((Waits, RuntimeError)):
            WAITS[case](x)


def test_ops_that_launch_are_counted() -> None:
    with fake_cuda():
        x = torch.zeros(3, device=DEVICE)
        with Ops() as ops:
            (x.view(1, 3) + torch.empty_like(x)).detach().mul_(2)
    assert ops.counts == {"add": 1, "mul_": 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_walk_equals_torchs_own_backward(variant: str) -> None:
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
        # Several gradients are added in another order
        torch.testing.assert_close(gradients[key], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def gradients_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.grad for key, value in module.named_parameters() if value.grad is not None}
