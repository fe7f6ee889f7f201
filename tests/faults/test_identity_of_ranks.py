"""Ranks with different options, images or weights end with an error instead of training something else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from fastssl.commands.pretrain import parse
from fastssl.errors import TrainingError
from fastssl.observe.notes import NoteQueue
from fastssl.train.identity import weights_hash
from fastssl.train.step import TrainStep
from fastssl.train.trainer import Trainer
from tests.fastssl.commands import commands_into
from tests.fastssl.rank_runs import fork_ranks, join
from tests.fastssl.small_methods import build
from tests.faults.runs import PICTURES, TINY, image_folder
from tests.faults.test_identity import another_name, another_size, fewer

# Options of the second rank only.
DIFFERENT_RANKS = {
    "rate": ["--optim.lr", "0.5"],
    "temperature": ["--method.temperature", "0.9"],
    "momentum": ["--method.momentum", "0.5"],
    "weight decay": ["--optim.weight-decay", "0.5"],
    "seed": ["--seed", "3"],
    "batch": ["--train.batch-size", "16"],
    "checkpoint period": ["--train.checkpoint-every", "3"],
    "log period": ["--train.log-every", "2"],
    "precision": ["--train.precision", "bf16"],
    "width": ["--model.width", "0.125"],
    "queue": ["--method.queue-size", "64"],
    "steps": ["--train.steps", "5"],
    "images": ["--data.pictures", "48"],
}
RANKS = ["--train.precision", "fp32", "--train.steps", "4", "--train.timeout-s", "20"]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with commands_into(tmp_path_factory.mktemp("output") / "output.txt") as commands:
        yield commands


def run_ranks(commands, first, second):
    commands.start_each([["pretrain", *arguments] for arguments in (first, second)])
    return commands.exit_codes()


@pytest.mark.slow
@pytest.mark.parametrize("difference", [*DIFFERENT_RANKS, "method"])
def test_ranks_with_other_options_end_with_a_sentence(commands, tmp_path, difference):
    arguments = [*TINY, *PICTURES, *RANKS, "--run.dir", str(tmp_path / "run")]
    if difference == "method":
        second = ["mocov2-cifar10", *arguments]
        arguments = ["unimoco-cifar10", *arguments]
    else:
        second = [*arguments, *DIFFERENT_RANKS[difference]]
    assert run_ranks(commands, arguments, second) == [2, 2]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", [fewer, another_size, another_name])
def test_ranks_with_other_images_end_with_a_sentence(commands, tmp_path, change):
    image_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    change(tmp_path / "b")
    both = ["mocov2-cifar10", *TINY, *RANKS, "--run.dir", str(tmp_path / "run")]
    first, second = ([*both, "--data.root", str(tmp_path / name)] for name in "ab")
    assert run_ranks(commands, first, second) == [2, 2]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_ranks_may_differ_in_what_belongs_to_a_machine(commands, tmp_path):
    for name in "ab":
        image_folder(tmp_path / name)
    both = ["mocov2-cifar10", *TINY, *RANKS]
    first = [*both, "--data.root", str(tmp_path / "a"), "--run.dir", str(tmp_path / "run")]
    second = [*both, "--data.root", str(tmp_path / "b"), "--run.dir", str(tmp_path / "x"), "--data.prefetch", "3"]
    assert run_ranks(commands, first, second) == [0, 0]


@pytest.mark.parametrize("name", ["mocov2", "smog"])
def test_the_hash_depends_on_every_weight_and_no_statistics(name):
    method = build(name, splits=2)
    before = weights_hash(method)
    assert weights_hash(method) == before
    for parameter in [*method.parameters(), *([method.groups] if name == "smog" else [])]:
        bits = parameter.detach().view(torch.int32)
        first = (0,) * bits.ndim
        bits[first] ^= 1
        assert weights_hash(method) != before
        bits[first] ^= 1
    for path, buffer in method.named_buffers():
        if path.endswith("running_mean"):
            buffer.add_(1)
    assert weights_hash(method) == before


def a_rank_whose_weights_drift(number, store, folder):
    join(store, number, 2)
    step = TrainStep.__call__

    def drifting(self, *arguments):
        output = step(self, *arguments)
        if number == 1:
            next(self.method.parameters()).data[0] += 1e-6
        return output

    TrainStep.__call__ = drifting
    trainer = Trainer(parse([*TINY, *PICTURES, *RANKS]), Path(folder), NoteQueue())
    with pytest.raises(TrainingError, match="the weights of the processes differ after step 1"):
        trainer.train()
    # Skip `destroy_process_group`, which could wait for the other rank
    os._exit(0)


@pytest.mark.slow
def test_diverging_weights_end_the_run(tmp_path):
    (tmp_path / "run").mkdir()
    arguments = (str(tmp_path / "store"), str(tmp_path / "run"))
    fork_ranks(a_rank_whose_weights_drift, arguments, 2)
