"""Known errors in options, variables and files: one sentence, exit code 2, and no folder is changed."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from fastssl.cli import main
from fastssl.config import to_json
from fastssl.presets import load


def refused(arguments, capsys, folder):
    """Whether the command ends with exit code 2 and one line, and does not change the folder."""
    before = sorted(path.name for path in folder.iterdir())
    code = main(arguments)
    error = capsys.readouterr().err
    return code == 2 and len(error.splitlines()) == 1 and sorted(path.name for path in folder.iterdir()) == before


OF_PRETRAIN = [
    *("--method.temperature inf", "--method.temperature 1e-300", "--method.momentum 1"),
    *("--method.queue-size 99999999999999", "--method.dim 99999999999", "--data.std 0 0 0"),
    *("--data.std -1 -1 -1", "--data.mean nan nan nan", "--data.root=", "--data.workers 100000"),
    *("--data.prefetch 99999999999", "--model.width inf", "--model.width 1e6", "--optim.lr inf"),
    *("--optim.lr 1e400", "--optim.weight-decay inf", "--optim.weight-decay 1e300", "--optim.trust inf"),
    *("--optim.milestones -5 -1", "--optim.milestones 5 1", "--eval.temperature inf"),
    *("--eval.temperature 1e-300", "--train.batch-size 99999999"),
    *("mocov2-cifar10 --train.batch-size 4 --model.splits 4", "--run.dir " + "x" * 300),
    *("--run.dir a\x00b", "--config a\x00b", "--config " + "x" * 5000, "x" * 5000),
    *("--tyro-print-completion zzz", "--tyro-write-completion bash no/folder/file"),
]


@pytest.mark.parametrize("arguments", OF_PRETRAIN)
def test_pretrain_refuses_before_it_creates_a_folder(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(["pretrain", *arguments.split(" ")], capsys, tmp_path)


@pytest.mark.parametrize(
    "command", ["pretrain", "preview", "bench e2e", "bench input", "eval knn", "resume", "data check"]
)
@pytest.mark.parametrize("more", [[""], ["--data.root", ""], ["--data.root="]])
def test_an_empty_argument_is_refused(command, more, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused([*command.split(), *more], capsys, tmp_path)


@pytest.mark.parametrize(
    "variables",
    [
        "WORLD_SIZE=abc",
        "WORLD_SIZE=",
        "WORLD_SIZE=2 RANK=0",
        "WORLD_SIZE=2 RANK=5 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
        "WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=x",
        "WORLD_SIZE=1 RANK=5",
        "WORLD_SIZE=2 RANK=a\nb",
    ],
)
def test_bad_torchrun_variables_are_refused_before_a_folder_is_created(variables, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in variables.split(" "):
        monkeypatch.setenv(*variable.split("="))
    assert refused(["pretrain", "--run.dir", str(tmp_path / "run"), "--train.device", "cpu"], capsys, tmp_path)


OF_OTHER_COMMANDS = [
    *("resume", "resume a b", "resume no/run", "resume " + "x" * 5000, "resume caf\udce9", "resume a\x00b"),
    *("resume --help=3", "eval", "eval knn", "eval zzz run", "eval knn no/run", "eval knn a\x00b"),
    *("eval knn caf\udce9", "eval knn . --k 0", "eval knn . --k x", "eval knn . --temperature inf"),
    *("eval knn . --temperature 1e-300", "eval knn " + "x" * 5000, "eval linear . --lr nan"),
    *("eval linear . --lr inf 1", "eval linear . --epochs 99999999999999", "eval linear . --zzz"),
    *("eval linear . --batch-size 99999999999", "eval linear . --schedule zzz", "eval linear . --data a\x00b"),
    *("plot", "plot no/run", "plot a\x00b", "plot caf\udce9", "plot " + "x" * 300, "report", "report no/run"),
    *("report a\x00b", "report a b", "data", "data check", "data zzz", "data check no/data"),
    *("data check a\x00b", "data check . --workers 99999", "data check . --workers x"),
    *("data check . --quarantine " + "x" * 300, "preview --images 0", "preview --images 99999999"),
    *("preview --step -1", "preview --out a\x00.png", "preview --out caf\udce9"),
    *("preview --method.temperature inf", "bench", "bench zzz", "bench input --seconds inf"),
    *("bench input --seconds nan", "bench input --images 0", "bench input --workers 99999999"),
    *("bench input zzz", "bench input --root no/data", "bench input --json a\x00b"),
    *("bench input --pipelines zzz", "bench step --threads 99999999", "bench step --steps 0"),
    *("bench step --batch-size 0", "bench step zzz", "bench step --profile a\x00b", "bench e2e --seconds -1"),
    *("bench e2e --threads 0", "bench e2e zzz", "bench e2e --method.dim 99999999999", "verify zzz"),
    *("verify --dtype zzz", "methods zzz", "presets zzz", "doctor zzz", "zzz", "a\nb", "caf\udce9"),
]


@pytest.mark.parametrize("arguments", OF_OTHER_COMMANDS)
def test_other_commands_refuse_in_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(arguments.split(" "), capsys, tmp_path)


WHOLE = json.loads(to_json(load("quickstart")))
EDITS = {
    "train.batch_size": ("32", 0, 2.5, True, None),
    "train": (None, 3, [], "zzz"),
    "views": (3, [1, 2], [], [{"flip": 0.5}] * 2, [{"size": 32, "flip": 2}] * 2, [{"size": "32"}] * 2, [{"zzz": 1}]),
    "eval_view": (None, {}, {"size": 1, "center_crop": 2}),
    "odd_views": (["a"], [{"size": 7}]),
    "method": (3, None, {}, []),
    "method.name": (3, None, "byol", ["mocov2"]),
    "method.shuffle": ("yes", 1),
    "method.head": ("zzz", None),
    "optim.optimizer": ("zzz", None),
    "optim.schedule": ("zzz", 1),
    "optim.betas": ([0.5], 0.5, ["a", "b"], [0.5, 1.0]),
    "optim.milestones": (["a"], [-5, -1], [5, 1], 3),
    "optim.lr": (float("nan"), float("inf"), 10**400, "0.1"),
    "train.non_finite": ("zzz",),
    "train.device": ("tpu", 1),
    "seed": (0.5, True, -1, 10**30),
    "data.std": ([0, 0, 0], [0.2, 0.2]),
    "data.workers": (100000, 1.5),
    "data.root": (3, "", "a\0b"),
    "preset": ("../../x", None, ""),
    "run.dir": ("x" * 300, 3),
}


def with_edit(place, value):
    config = deepcopy(WHOLE)
    *sections, name = place.split(".")
    holder = config[sections[0]] if sections else config
    holder[name] = value
    return json.dumps(config)


TEXTS = {f"{place} {str(value)[:30]}": with_edit(place, value) for place in EDITS for value in EDITS[place]}
TEXTS |= {
    f"without {name}": json.dumps({key: WHOLE[key] for key in WHOLE if key != name})
    for name in ("run", "data", "model", "method", "optim", "train", "eval", "views", "eval_view")
}
TEXTS |= {
    "unknown option": with_edit("optim.lrr", 1),
    "key twice": json.dumps(WHOLE).replace('"lr"', '"lr": 1, "lr"'),
    "nested 100000 deep": "[" * 100000,
    "nested 900 deep": json.dumps(WHOLE).replace('"steps": null', '"steps": ' + "[" * 900 + "]" * 900),
    "5000 digits": json.dumps(WHOLE).replace('"seed": 0', '"seed": ' + "9" * 5000),
    "a list": "[]",
    "empty": "",
    "no JSON": "batch_size: 32",
    "zero byte": "\0",
}


@pytest.mark.parametrize("fault", TEXTS)
@pytest.mark.parametrize("command", ["pretrain --config {file} --run.dir {new}", "resume {run}", "eval knn {run}"])
def test_a_broken_configuration_is_refused(fault, command, capsys, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(TEXTS[fault])
    arguments = command.format(file=run / "config.json", run=run, new=tmp_path / "new").split()
    assert refused(arguments, capsys, run)
    assert not (tmp_path / "new").exists()
