"""Any options, variables and configuration files are accepted, or refused in one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
from copy import deepcopy
from random import Random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.commands.pretrain import parse
from fastssl.config import Config, from_json, to_json
from fastssl.distributed import joined_ranks
from fastssl.errors import ConfigError
from fastssl.presets import load
from fastssl.run_folder import config_text

NASTY = (
    *(None, True, False, 0, -1, 1, 0.5, 1e-300, 1e300, 10**20, 10**400, "", "32", "zzz", "a\0b", "\ud800", "\udce9"),
    *("a\nb", "x" * 5000, "../..", [], [0.5], ["a"], [[]], [None] * 3, {}, {"name": "mocov2"}, {"a": {"b": [1]}}),
)
VALUES = st.recursive(
    st.sampled_from(NASTY) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)
WORDS = (
    *("inf", "-inf", "nan", "1e400", "1e-300", "1e300", "-1", "0", "1", "2", "0.5", "9" * 20, "9" * 5000, "abc"),
    *(
        "x" * 5000,
        "None",
        "True",
        "-",
        "--",
        "--zzz",
        "\udce9",
        "a\nb",
        "[bold]",
        "│",
        "²",
        "0x10",
        "1_000",
        "../..",
        "/",
    ),
)


def outcome(attempt):
    """The result of `attempt`, or the ConfigError that it raises; any other error is a bug."""
    try:
        return attempt()
    except ConfigError as error:
        return error


def fine(result):
    """Whether this is a configuration that survives a round trip through its file, or a printable sentence."""
    if isinstance(result, Config):
        return from_json(to_json(result)) == result
    text = str(result)
    return isinstance(result, ConfigError) and len(text.splitlines()) == 1 and len(text) < 2000


def places(tree, path=()):
    """The paths of all values of a JSON object, including nested objects and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(tree, path, change, value):
    """The text of the configuration with one entry replaced, removed, added or duplicated."""
    *parents, last = path
    holder = tree
    for key in parents:
        holder = holder[key]
    if change == "replace":
        holder[last] = value
    elif change == "remove":
        del holder[last]
    elif isinstance(holder, list):
        holder.append(value)
    else:
        holder[str(last) + change] = value
    text = json.dumps(tree)
    return text.replace(f'"{last}twice"', f'"{last}"') if change == "twice" else text


FILES = [json.loads(to_json(load(name))) for name in ("quickstart", "smog-imagenet", "msvq-cifar10", "unmix-cifar10")]
PLACES = [(index, path) for index, file in enumerate(FILES) for path in places(file)]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(PLACES), st.sampled_from(("replace", "remove", "added", "twice")), VALUES)
def test_a_changed_configuration_is_accepted_or_refused(place, change, value):
    index, path = place
    assert fine(outcome(lambda: from_json(changed(deepcopy(FILES[index]), path, change, value))))


def test_a_wrong_type_is_never_accepted():
    tried = 0
    for index, path in PLACES:
        for value in ({"a": 1}, [["a"]]):
            result = outcome(lambda: from_json(changed(deepcopy(FILES[index]), path, "replace", value)))  # noqa: B023
            assert isinstance(result, ConfigError), (path, value)
            assert fine(result)
            tried += 1
    assert tried > 1000


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.randoms(use_true_random=False), st.binary(max_size=20))
def test_a_damaged_file_is_accepted_or_refused(tmp_path_factory, random, data):
    whole = json.dumps(FILES[0]).encode()
    start, end = sorted(random.choices(range(len(whole)), k=2)) if random.random() < 0.5 else (0, len(whole))
    position = random.randrange(start, end + 1)
    file = tmp_path_factory.getbasetemp() / "damaged.json"
    file.write_bytes(whole[start:position] + data + whole[position:end])
    assert fine(outcome(lambda: from_json(config_text(file))))


def option_names():
    """The options by preset, one preset for each method that adds options."""
    for preset in ("quickstart", "co2-cifar10", "smog-imagenet", "msvq-cifar10", "unmix-cifar10", "mixco-cifar10"):
        config = load(preset)
        yield preset, "--seed"
        for section in ("run", "data", "model", "method", "optim", "train", "eval"):
            for field in dataclasses.fields(getattr(config, section)):
                if section == "method" or preset == "quickstart":
                    yield preset, f"--{section}.{field.name.replace('_', '-')}"


OPTIONS = list(option_names())
ARGUMENTS = st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="\0"), max_size=12)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(OPTIONS), st.lists(ARGUMENTS, max_size=3))
def test_an_option_is_accepted_or_refused(option, values):
    preset, name = option
    assert fine(outcome(lambda: parse([preset, name, *values])))


@pytest.mark.slow
def test_every_option_is_accepted_or_refused():
    tried = 0
    for preset, name in OPTIONS:
        word = Random(name).choice(WORDS)
        assert fine(outcome(lambda: parse([preset, name, word]))), (name, word)  # noqa: B023
        tried += 1
    assert tried > 100


VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR")
NUMBERS = ("", " ", "0", "1", "2", "5", "-1", "65536", "29500", "x", "1.0", "²", "9" * 5000, "127.0.0.1", "\udce9")
TWO = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": "29500", "MASTER_ADDR": "127.0.0.1"}
ENVIRONMENTS = st.builds(
    lambda variables, start: {**start, **variables},
    st.dictionaries(
        st.sampled_from(VARIABLES),
        st.sampled_from(NUMBERS)
        | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
        max_size=3,
    ),
    st.sampled_from(({}, TWO)),
)


@pytest.fixture
def joined(monkeypatch):
    """The environments in which a process group was requested; none is created."""
    environments = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: environments.append(dict(os.environ)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    return environments


def test_an_environment_is_accepted_or_refused(joined):
    refused = []

    def join():
        with joined_ranks(torch.device("cpu"), timeout_s=5):
            return None

    @settings(max_examples=500, deadline=None, derandomize=True, database=None)
    @given(ENVIRONMENTS)
    def one(variables):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            error = outcome(join)
        assert error is None or fine(error)
        refused.append(error is not None)

    one()
    assert len(joined) > 5
    assert sum(refused) > 100
    for variables in joined:
        assert 0 <= int(variables["RANK"]) < int(variables["WORLD_SIZE"])
        assert 1 <= int(variables["MASTER_PORT"]) < 65536


def test_facts_that_are_not_options_cannot_be_given_as_options():
    config = json.loads(to_json(load("quickstart")))
    for identity in ({}, 3, None, [{"a": [1, {}]}], {"images": {"count": 3}}):
        assert from_json(json.dumps({**config, "identity": identity})) == load("quickstart")
