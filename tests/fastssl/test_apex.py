"""NVIDIA apex, replaced by a fake module: the right classes are called, and its absence is one sentence."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from fastssl.apex import why_not_apex
from fastssl.commands.doctor import report
from fastssl.config import OptimConfig
from fastssl.errors import ConfigError
from fastssl.models.norm import norm_layer
from fastssl.train.optim import build_optimizer


@pytest.fixture
def apex(monkeypatch):
    """Modules with the names of NVIDIA's, whose classes record their arguments."""

    class Kept:
        def __init__(self, *given, **options):
            self.given, self.options = given, options

    modules = {name: ModuleType(name) for name in ("apex", "apex.optimizers", "apex.contrib.group_norm")}
    modules["apex"].__spec__ = object()
    for name in ("FusedSGD", "FusedAdam", "FusedLAMB", "FusedNovoGrad"):
        setattr(modules["apex.optimizers"], name, type(name, (Kept,), {}))
    modules["apex.contrib.group_norm"].GroupNorm = Kept
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(
    ("optimizer", "name", "option"),
    [
        ("sgd", "FusedSGD", ("momentum", 0.8)),
        ("adamw", "FusedAdam", ("betas", (0.5, 0.6))),
        ("lamb", "FusedLAMB", ("betas", (0.5, 0.6))),
        ("novograd", "FusedNovoGrad", ("betas", (0.5, 0.6))),
    ],
)
def test_apex_builds_the_requested_optimizer(apex, optimizer, name, option):
    config = OptimConfig(
        impl="apex",
        optimizer=optimizer,
        lr=0.3,
        weight_decay=0.1,
        momentum=0.8,
        betas=(0.5, 0.6),
        decay_norm_and_bias=False,
    )
    made = build_optimizer(nn.Linear(2, 3), config)
    assert type(made).__name__ == name
    assert made.options == {"lr": 0.3, "weight_decay": 0.1, option[0]: option[1]}
    ((weights, others),) = made.given
    assert [p.ndim for p in weights["params"]] == [2]
    assert others["weight_decay"] == 0


def test_apex_builds_the_group_norm(apex):
    assert norm_layer("apex-group")(64).given == (32, 64)


@pytest.mark.skipif(why_not_apex() is None, reason="NVIDIA apex is installed")
def test_without_apex_the_error_names_the_option():
    with pytest.raises(ConfigError, match=r"--optim\.impl apex with .* lamb was given .* not installed"):
        build_optimizer(nn.Linear(2, 3), OptimConfig(impl="apex", optimizer="lamb"))
    with pytest.raises(ConfigError, match=r"--model\.norm apex-group was given"):
        norm_layer("apex-group")(64)
    assert ("NVIDIA apex", "not installed") in dict(report())["optional"]


def test_the_unrelated_package_of_the_same_name_is_rejected(monkeypatch):
    other = ModuleType("apex")
    other.__spec__ = object()
    monkeypatch.setitem(sys.modules, "apex", other)
    assert "the installed apex has no apex.optimizers" in why_not_apex()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"impl": "apex", "optimizer": "lars"}, "which is our own"),
        ({"optimizer": "novograd"}, "add --optim.impl apex"),
    ],
)
def test_impossible_combinations_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        OptimConfig(**options)


def test_group_norm_trains_a_narrow_encoder():
    norm = norm_layer("group")(4)
    rows = torch.randn(2, 4, 5, 5)
    assert norm.num_groups == 4
    torch.testing.assert_close(norm(rows).mean((2, 3)), torch.zeros(2, 4), rtol=0, atol=1e-6)
