"""Without tyro, argparse reads the same options to the same values; it also explains errors in one sentence."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from fastssl.arguments import parse
from fastssl.commands.bench_step import Options as StepOptions
from fastssl.commands.data_check import Options as CheckOptions
from fastssl.commands.evaluate import LinearOptions
from fastssl.commands.plot import Options as PlotOptions
from fastssl.commands.preview import Options as PreviewOptions
from fastssl.commands.verify import Options as VerifyOptions
from fastssl.config import Config
from fastssl.errors import ConfigError
from fastssl.plain_arguments import parse_plainly
from fastssl.presets import PRESETS, load


def plainly(cls, arguments, default=None):
    return parse_plainly(cls, arguments, prog="prog", default=default, all_known=True)[0]


OF_CONFIG = [
    "",
    "--seed 3 --train.batch-size 32 --train.batch_size=64",
    "--run.dir some/run --data.root None",
    "--train.deterministic --data.download --data.dataset CIFAR10 --data.root a",
    "--run.tensorboard --run.no-tensorboard --optim.no-decay-norm-and-bias",
    "--optim.milestones 3 5 --optim.schedule step --optim.betas 0.5 0.75",
    "--optim.milestones --optim.lr 1e-3",
    "--method.queue-size 512 --method.no-shuffle --method.head mlp-bn",
    "--train.steps 3 --train.steps None --train.compile off",
    "--data.std 0.1 0.2 0.3 --data.label-fraction 1 --model.width .5",
]


@pytest.mark.parametrize("arguments", OF_CONFIG)
def test_options_of_a_run_are_read_as_by_tyro(arguments):
    default, given = load("quickstart"), shlex.split(arguments)
    config = plainly(Config, given, default)
    assert config == parse(Config, given, prog="prog", default=default)
    assert (config == default) == (arguments == "")


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (VerifyOptions, ""),
        (VerifyOptions, "info_nce --dtype float32"),
        (StepOptions, "--repeats 2 quickstart --threads 1"),
        (CheckOptions, "some/folder --workers 3"),
        (PlotOptions, "one two --out folder"),
        (PlotOptions, "--out folder"),
        (LinearOptions, "run --lr 0.5 3 --schedule cosine --epochs 2"),
        (PreviewOptions, "--images 3 --out a.png"),
    ],
)
def test_options_of_other_commands_are_read_as_by_tyro(cls, arguments):
    given = shlex.split(arguments)
    assert plainly(cls, given) == parse(cls, given, prog="prog")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_of_every_preset_can_be_given(preset):
    """Giving every default as text changes nothing."""
    default = load(preset)
    for section in ("data", "model", "method", "optim", "train", "eval"):
        part = getattr(default, section)
        given = []
        for field in dataclasses.fields(part):
            value, name = getattr(part, field.name), field.name.replace("_", "-")
            if isinstance(value, bool):
                given.append(f"--{section}.{'' if value else 'no-'}{name}")
            elif isinstance(value, tuple):
                given += [f"--{section}.{name}", *map(str, value)]
            else:
                given += [f"--{section}.{name}", str(value)]
        assert plainly(Config, given, default) == default


REFUSED = [
    ("--train.batch-size abc", '--train.batch-size "abc" was given; it must be an integer'),
    ("--train.batch-size None", '--train.batch-size "None" was given; it must be an integer'),
    ("--train.steps 0", "--train.steps 0 was given; it must be at least 1"),
    ("--optim.lr nan", "--optim.lr nan was given; it must be a finite number"),
    ("--optim.milestones 3 x", '--optim.milestones 3 "x": value "x" was given; it must be an integer'),
    ("--optim.betas 0.5", "--optim.betas: expected 2 arguments"),
    ("--train.compile maybe", '--train.compile "maybe" was given; it must be one of auto, on, off'),
    ("--train.batch-sise 3", "unknown option '--train.batch-sise'; did you mean '--train.batch-size'?"),
    ("--seed", "expected one argument"),
    ("stray", "unknown option 'stray'"),
    ("--preset mine", "unknown option '--preset'"),
    ("--data.std 0 0 0", "--data.std 0 0 0: value 0.0 was given; it must be at least 0.001"),
    ("--model.norm split --train.batch-size 7", "--train.batch-size 7 was given with --model.splits"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_unreadable_arguments_are_one_sentence(arguments, words):
    default, given = load("quickstart"), shlex.split(arguments)
    for read in (plainly, lambda cls, given, default: parse(cls, given, prog="prog", default=default)):
        with pytest.raises(ConfigError) as error:
            read(Config, given, default)
        assert words in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_a_missing_argument_is_one_sentence():
    with pytest.raises(ConfigError, match="no root was given"):
        plainly(CheckOptions, [])


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        plainly(Config, ["--help"], load("quickstart"))
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--train.batch-size INT" in shown
    assert "{auto,on,off}" in shown
    assert "--views" not in shown


def test_unknown_arguments_are_returned_in_order():
    given = ["mocov2-cifar10", "--data.root", "x", "--images", "3", "--seed=4"]
    options, rest = parse_plainly(PreviewOptions, given, prog="prog", default=None, all_known=False)
    assert options.images == 3
    assert rest == ["mocov2-cifar10", "--data.root", "x", "--seed=4"]
