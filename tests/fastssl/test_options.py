from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from fastssl.config import DataConfig, OptimConfig, TrainConfig, from_json, to_json
from fastssl.distributed import joined_ranks, local_rank, started_ranks
from fastssl.errors import ConfigError
from fastssl.methods import METHODS
from fastssl.presets import PRESETS, load
from fastssl.validation import Checked, Range
from fastssl_pipelines.views import ViewSpec


@dataclass(frozen=True, kw_only=True)
class Sample(Checked, prefix="--sample."):
    flag: bool = False
    count: int = 1
    share: Annotated[float, Range(least=0, most=1)] = 0.5
    above: Annotated[float | None, Range(above=0, below=2)] = 1.0
    name: str = "a"
    path: Path = Path("a")
    kind: Literal["one", 2] = "one"
    several: tuple[Annotated[int, Range(least=1)], ...] = ()
    pair: tuple[float, float] = (0.0, 1.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"share": 1}, 1.0),
        ({"path": "b/c"}, Path("b/c")),
        ({"several": [3, 1]}, (3, 1)),
        ({"pair": [0, 2]}, (0.0, 2.0)),
        ({"kind": 2}, 2),
    ],
)
def test_json_values_are_converted_to_the_hint(given, expected):
    value = getattr(Sample(**given), *given)
    assert (type(value), value) == (type(expected), expected)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"flag": 1}, "--sample.flag 1 was given; it must be true or false"),
        ({"flag": "yes"}, '--sample.flag "yes" was given; it must be true or false'),
        ({"count": True}, "--sample.count True was given; it must be an integer"),
        ({"count": 0.5}, "--sample.count 0.5 was given; it must be an integer"),
        ({"count": None}, "--sample.count None was given; it must be an integer"),
        ({"share": 1.5}, "--sample.share 1.5 was given; it must be in [0, 1]"),
        ({"share": float("nan")}, "--sample.share nan was given; it must be a finite number"),
        ({"share": True}, "--sample.share True was given; it must be a finite number"),
        ({"share": 10**400}, f"--sample.share 1{'0' * 59}... was given; it must be a finite number"),
        ({"above": 0}, "--sample.above 0 was given; it must be above 0 and below 2"),
        ({"above": 2}, "--sample.above 2 was given; it must be above 0 and below 2"),
        ({"name": 3}, "--sample.name 3 was given; it must be a text"),
        ({"path": ""}, '--sample.path "" was given; it must be a path without zero bytes that is not empty'),
        ({"path": "a\0"}, '--sample.path "a\\x00" was given; it must be a path without zero bytes that is not empty'),
        ({"path": "\ud800"}, '--sample.path "\\ud800" was given; it must be a path that can be encoded'),
        ({"path": 3}, "--sample.path 3 was given; it must be a path"),
        ({"kind": "2"}, '--sample.kind "2" was given; it must be one of one, 2'),
        ({"kind": ["one"]}, '--sample.kind "one" was given; it must be one of one, 2'),
        ({"several": 3}, "--sample.several 3 was given; it must be a list"),
        ({"several": [3, 0]}, "--sample.several 3 0: value 0 was given; it must be at least 1"),
        ({"several": [3, "a"]}, '--sample.several 3 "a": value "a" was given; it must be an integer'),
        ({"pair": [1.0]}, "--sample.pair 1 was given; it must be a list of 2"),
    ],
)
def test_a_value_that_does_not_fit_the_hint_is_one_sentence(given, sentence):
    with pytest.raises(ConfigError) as error:
        Sample(**given)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("name", "fits"),
    [("a" * 255, True), ("a" * 256, False), ("é" * 128, False), ("a/" * 2047, True), ("a/" * 2048, False)],
)
def test_a_path_must_fit_the_limits_of_a_file_system(name, fits):
    with nullcontext() if fits else pytest.raises(ConfigError, match=r"it must be a path of at most 4095 bytes"):
        Sample(path=name)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name):
    config = load(name)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: METHODS["mocov2"].Config(momentum=1),
            "--method.momentum 1 was given; it must be at least 0 and below 1",
        ),
        (lambda: METHODS["mocov2"].Config(queue_size=2**28, dim=2**14), "--method.dim 16384; they need 16384 GiB"),
        (lambda: METHODS["smog"].Config(bank_size=2**28, dim=256), "--method.bank-size 268435456 was given with"),
        (
            lambda: METHODS["smog"].Config(groups=2**20, heads=1024, bank_size=2**20),
            "--method.groups 1048576 was given",
        ),
        (lambda: OptimConfig(milestones=(5, 3)), "--optim.milestones 5 3 was given; it must be in ascending order"),
        (lambda: DataConfig(std=(0.2, 0, 0.2)), "--data.std 0.2 0 0.2: value 0 was given; it must be at least 0.001"),
        (lambda: replace(load("quickstart"), preset="a/b"), 'preset "a/b" was given; it must be at most 100 letters'),
        (lambda: replace(load("quickstart"), train=3), "--train 3 was given; it must be an object with the fields of"),
    ],
)
def test_relations_and_limits_are_one_sentence(make, words):
    with pytest.raises(ConfigError) as error:
        make()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("norm", "batch", "splits", "accumulate", "fits"),
    [
        ("split", 16, 8, 1, True),
        ("split", 8, 8, 1, False),
        ("local", 2, 8, 1, True),
        ("local", 1, 8, 1, False),
        ("local", 4, 8, 4, False),
        ("sync", 1, 8, 1, False),
        ("group", 1, 8, 1, True),
    ],
)
def test_batch_norm_of_a_single_image_is_refused(norm, batch, splits, accumulate, fits):
    config = load("mocov2-cifar10")
    model, train = replace(config.model, norm=norm, splits=splits), TrainConfig(batch_size=batch, accumulate=accumulate)
    with (
        nullcontext() if fits else pytest.raises(ConfigError, match=rf"--train\.batch-size {batch} .* 2 images or more")
    ):
        replace(config, model=model, train=train)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 2**15},
        {"ratio": (0.5, float("inf"))},
        {"ratio": (0.5, float("nan"))},
        {"blur_sigma": (2.0, 1.0)},
        {"blur_sigma": (-1.0, 1.0)},
        {"blur_sigma": (0.1, float("inf"))},
    ],
)
def test_an_impossible_view_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ViewSpec(**{"size": 32, **changes})


TWO = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc' in the environment; it must be an integer from 1 to"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE is '²'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "1", "RANK": "5"}, "RANK is '5' in the environment; it must be an integer from 0 to 0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (TWO | {"RANK": "5"}, "RANK is '5' in the environment; it must be an integer from 0 to 1"),
        (TWO | {"RANK": "-1"}, "RANK is '-1'"),
        (TWO | {"LOCAL_RANK": "2"}, "LOCAL_RANK is '2'"),
        (TWO | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x' in the environment; it must be an integer from 1 to 65535"),
        (TWO | {"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        (TWO | {"MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
    ],
)
def test_an_inconsistent_environment_is_one_sentence(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error, joined_ranks(torch.device("cpu"), timeout_s=5):
        pass
    assert sentence in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_without_variables_there_is_one_rank():
    assert (started_ranks(), local_rank()) == (1, 0)
