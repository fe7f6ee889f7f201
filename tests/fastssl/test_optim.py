from __future__ import annotations

import copy
import io
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastssl.config import OptimConfig
from fastssl.errors import ConfigError
from fastssl.schedule import learning_rate
from fastssl.train.lars import EPS, LARS
from fastssl.train.optim import build_optimizer

SHAPES = [(4, 3, 2, 2), (5,), (5, 4), ()]


def drawn(dtype, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


def parameters(dtype=torch.float32):
    return [nn.Parameter(value) for value in drawn(dtype)]


def set_gradients(params, step):
    for p, gradient in zip(params, drawn(params[0].dtype, seed=100 + step), strict=True):
        p.grad = gradient


def plain_lars(p, gradient, buffer, *, lr, momentum, weight_decay, trust):
    """For one tensor, a line per rule: adaptive rate, decay added to the gradient, SGD with momentum."""
    size, slope = float(p.norm()), float(gradient.norm())
    rate = 1.0 if size == 0 or slope == 0 else trust * size / (slope + weight_decay * size + EPS)
    buffer = momentum * buffer + rate * (gradient + weight_decay * p)
    return p - lr * buffer, buffer


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_lars_equals_its_definition_for_every_tensor(dtype, tolerance):
    options = {"lr": 3.0, "momentum": 0.9, "weight_decay": 0.05, "trust": 0.02}
    params = parameters(dtype)
    with torch.no_grad():
        params[1].zero_()  # As biases are initially
    expected = [(p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for p in params]
    optimizer = LARS(params, **options)
    for step in range(5):
        set_gradients(params, step)
        params[2].grad = torch.zeros_like(params[2]) if step == 3 else params[2].grad
        expected = [
            plain_lars(value, p.grad.double(), buffer, **options)
            for p, (value, buffer) in zip(params, expected, strict=True)
        ]
        optimizer.step()
        for p, (value, _) in zip(params, expected, strict=True):
            assert p.dtype == dtype
            torch.testing.assert_close(p.double(), value, rtol=tolerance, atol=tolerance)


def test_lars_does_not_depend_on_the_size_of_the_gradient():
    moves = []
    for factor in (1.0, 1000.0):
        params = parameters(torch.float64)
        set_gradients(params, 0)
        for p in params:
            p.grad *= factor
        LARS(params, lr=1.0, momentum=0.0, weight_decay=0.0, trust=0.01).step()
        moves.append([p - before for p, before in zip(params, drawn(torch.float64), strict=True)])
    for one, other, start in zip(*moves, drawn(torch.float64), strict=True):
        torch.testing.assert_close(one, other)
        assert float(one.detach().norm()) == pytest.approx(0.01 * float(start.norm()))


def test_lars_does_not_change_parameters_without_gradient():
    params = parameters()
    set_gradients(params, 0)
    params[0].grad = None
    optimizer = LARS(params, lr=1.0, momentum=0.9, weight_decay=0.1, trust=0.1)
    optimizer.step()
    assert torch.equal(params[0], drawn(torch.float32)[0])
    assert not torch.equal(params[2], drawn(torch.float32)[2])
    optimizer.zero_grad()
    optimizer.step()


def test_lars_never_reads_a_value_from_the_device(monkeypatch):
    """A tensor on the meta device has no values, so reading one raises; torch's fused kernel is replaced."""
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *given, **options: None)
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = LARS(params, lr=1.0, momentum=0.9, weight_decay=0.1, trust=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_an_overflow_at_the_first_step_leaves_no_trace(optimizer, monkeypatch):
    """torch's SGD once used uninitialized momentum, and LARS waited for the device to learn of the overflow."""
    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", None)  # It reads found_inf on the host
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: torch.full_like(like, 1e30, **options))
    config = OptimConfig(optimizer=optimizer, lr=0.5, trust=0.02)
    results = []
    for overflows in (False, True):
        model = nn.ParameterList(parameters())
        built, scaler = build_optimizer(model, config), torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))  # Creates the scale
        for step in [None, 0, 1] if overflows else [0, 1]:
            set_gradients(list(model), step or 0)
            for p in model:
                p.grad *= torch.inf if step is None else scaler.get_scale()
            scaler.unscale_(built)
            scaler.step(built)
            scaler.update()
        assert scaler.get_scale() == (2.0 if overflows else 4.0)
        results.append([p.detach() for p in model])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_loaded_state_goes_into_the_existing_tensors(optimizer):
    model = nn.ParameterList(parameters())
    built = build_optimizer(model, OptimConfig(optimizer=optimizer, lr=0.5))
    new = built.state_dict()
    held = {p: dict(values) for p, values in built.state.items()}
    assert all(torch.count_nonzero(value) == 0 for values in held.values() for value in values.values())
    for p, start in zip(model, drawn(torch.float32), strict=True):
        assert torch.equal(p, start)  # Creating the state did not change them
        assert p.grad is None
    set_gradients(list(model), 0)
    built.step()
    saved = copy.deepcopy(built.state_dict())
    built.step()
    for state, expected in ((saved, saved["state"]), ({**new, "state": {}}, None)):
        built.load_state_dict(state)
        for index, (p, values) in enumerate(held.items()):
            for name, value in values.items():
                assert built.state[p][name] is value
                assert torch.equal(value, expected[index][name] if expected else torch.zeros_like(value))


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_a_restored_optimizer_continues_bit_for_bit(optimizer):
    config = OptimConfig(optimizer=optimizer, lr=0.5, decay_norm_and_bias=False)

    def stepped(model, optimizer, steps):
        for step in steps:
            set_gradients(list(model), step)
            optimizer.step()
        return [p.detach().clone() for p in model]

    model = nn.ParameterList(parameters())
    first = build_optimizer(model, config)
    stepped(model, first, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": first.state_dict()}, file)
    expected = stepped(model, first, range(3, 6))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])
    second = build_optimizer(twin, config)
    twin.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    assert all(map(torch.equal, stepped(twin, second, range(3, 6)), expected))


@pytest.mark.parametrize("decay", [True, False])
def test_weight_decay_excludes_norm_and_bias_on_request(decay):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model[0].bias.requires_grad = False
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5, decay_norm_and_bias=decay))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    after = dict(model.named_parameters())
    torch.testing.assert_close(after["0.weight"], 0.95 * before["0.weight"])
    torch.testing.assert_close(after["1.weight"], (0.95 if decay else 1.0) * before["1.weight"])
    assert torch.equal(after["0.bias"], before["0.bias"])


def test_the_options_choose_the_optimizer():
    model = nn.Linear(3, 2)
    lars = build_optimizer(model, OptimConfig(optimizer="lars", lr=2.0, momentum=0.8, weight_decay=0.1, trust=0.3))
    assert isinstance(lars, LARS)
    assert {key: lars.param_groups[0][key] for key in ("lr", "momentum", "weight_decay", "trust")} == {
        "lr": 2.0,
        "momentum": 0.8,
        "weight_decay": 0.1,
        "trust": 0.3,
    }
    sgd = build_optimizer(model, OptimConfig())
    assert isinstance(sgd, torch.optim.SGD)
    assert [len(group["params"]) for group in sgd.param_groups] == [2]


def rates(optim, *, steps_per_epoch=10, epochs=4):
    return [
        learning_rate(optim, step, total_steps=steps_per_epoch * epochs, steps_per_epoch=steps_per_epoch)
        for step in range(steps_per_epoch * epochs)
    ]


def test_learning_rate_follows_the_published_schedules():
    by_epoch = rates(OptimConfig(lr=2.0, schedule="cosine-epoch"))
    assert by_epoch[:10] == [2.0] * 10
    assert by_epoch[20:30] == pytest.approx([1.0] * 10)
    by_step = rates(OptimConfig(lr=2.0, schedule="cosine"))
    assert by_step[20] == pytest.approx(1.0)
    assert all(a > b > 0 for a, b in itertools.pairwise(by_step))
    stepped = rates(OptimConfig(lr=2.0, schedule="step", milestones=(1, 3)))
    assert [stepped[i] for i in (9, 10, 29, 30)] == pytest.approx([2.0, 0.2, 0.2, 0.02])
    warm = rates(OptimConfig(lr=2.0, warmup_epochs=1))
    assert warm[0] == 0
    assert warm[5] == pytest.approx(1.0)
    assert warm[10] == 2.0


def test_warm_up_and_cosine_go_between_the_given_rates():
    """SMoG and SwAV: from 0.1 via 2.0 to 0.5, and halfway between them in the middle of each part."""
    both = OptimConfig(lr=2.0, warmup_epochs=2, warmup_lr=0.1, final_lr=0.5)
    values = rates(both)
    assert [values[0], values[10], values[20], values[30]] == pytest.approx([0.1, 1.05, 2.0, 1.25])
    assert 0.5 < values[-1] < 0.52
    assert all(a < b for a, b in itertools.pairwise(values[:21]))
    assert all(a > b for a, b in itertools.pairwise(values[20:]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trust": 0.0}, ["--optim.trust 0.0", "above 0"]),
        ({"final_lr": 0.2}, ["--optim.final-lr 0.2", "--optim.lr", "0.1"]),
        ({"final_lr": -0.1}, ["--optim.final-lr -0.1"]),
        ({"warmup_lr": 0.2}, ["--optim.warmup-lr 0.2", "--optim.lr"]),
        ({"final_lr": 0.05, "schedule": "step"}, ["--optim.final-lr 0.05", "--optim.schedule step"]),
    ],
)
def test_options_of_the_optimizer_are_checked(changes, words):
    with pytest.raises(ConfigError) as error:
        replace(OptimConfig(lr=0.1), **changes)
    for word in words:
        assert word in str(error.value)
