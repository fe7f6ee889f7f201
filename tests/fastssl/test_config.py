from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from fastssl.cli import parse
from fastssl.config import OptimConfig, TrainConfig, from_json, to_json
from fastssl.errors import ConfigError
from fastssl.methods import METHODS
from fastssl.presets import PRESETS, load
from fastssl.train.schedule import learning_rate


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json_and_a_changed_option(name):
    config = load(name)
    assert config.preset == name
    assert len(config.views) == METHODS[config.method.name].number_of_views
    changed = replace(config, train=replace(config.train, steps=7), data=replace(config.data, root="/some/where"))
    assert from_json(to_json(config)) == config
    assert str(from_json(to_json(changed)).data.root) == "/some/where"
    assert from_json(to_json(changed)).train.steps == 7


def test_published_hyperparameters():
    """facebookresearch/moco: main_moco.py, README; its CIFAR-10 notebook; dddzg/unimoco README."""
    v1, v2, cifar = load("mocov1-imagenet"), load("mocov2-imagenet"), load("mocov2-cifar10")
    unimoco = load("unimoco-imagenet")
    assert (v1.method.temperature, v1.method.queue_size, v1.method.momentum) == (0.07, 65536, 0.999)
    assert (v1.method.head, v2.method.head, cifar.method.head) == ("linear", "mlp", "linear")
    assert (v2.method.temperature, v2.method.queue_size, v2.method.momentum) == (0.2, 65536, 0.999)
    assert (v1.optim.schedule, v1.optim.milestones, v2.optim.schedule) == ("step", (120, 160), "cosine-epoch")
    assert {(c.optim.lr, c.optim.weight_decay, c.train.batch_size) for c in (v1, v2, unimoco)} == {(0.03, 1e-4, 256)}
    assert (v1.train.epochs, v2.train.epochs, unimoco.train.epochs) == (200, 200, 800)
    assert unimoco.method.name == "unimoco"
    assert unimoco.method.temperature == 0.2
    assert v1.views[0].jitter == (0.4, 0.4, 0.4, 0.4)
    assert v1.views[0].jitter_probability == 1
    assert (v2.views[0].jitter, v2.views[0].jitter_probability) == ((0.4, 0.4, 0.4, 0.1), 0.8)
    assert (v1.views[0].blur, v2.views[0].blur, v2.views[0].blur_sigma) == (0, 0.5, (0.1, 2.0))
    assert (cifar.method.temperature, cifar.method.queue_size, cifar.method.momentum) == (0.1, 4096, 0.99)
    assert (cifar.optim.lr, cifar.optim.weight_decay, cifar.train.batch_size) == (0.06, 5e-4, 512)
    assert (cifar.views[0].scale, cifar.views[0].blur, cifar.model.stem) == ((0.08, 1.0), 0, "small")
    assert {c.model.splits for c in (v1, v2, cifar)} == {8}


def test_command_line_options_reach_the_configuration(tmp_path):
    config = parse(
        f"unimoco-cifar10 --run.dir {tmp_path} --data.root /d --data.pipeline dali --data.label-fraction 0.3 "
        "--train.steps 5 --train.epochs 2 --train.batch-size 64 --seed 9 --method.queue-size 128".split()
    )
    assert (config.run.dir, str(config.data.root), config.data.pipeline) == (tmp_path, "/d", "dali")
    assert (config.data.label_fraction, config.train.steps, config.train.epochs) == (0.3, 5, 2)
    assert (config.train.batch_size, config.seed, config.method.queue_size) == (64, 9, 128)
    assert parse([]).preset == "quickstart"


def test_config_file_is_the_default_and_options_go_over_it(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(to_json(parse(["mocov2-cifar10", "--optim.lr", "0.5", "--run.dir", "/a/run"])))
    config = parse(["--config", str(file), "--seed", "3"])
    assert (config.optim.lr, config.seed, config.method.name, config.run.dir) == (0.5, 3, "mocov2", None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("mocov2-cifra10", ["mocov2-cifra10", "did you mean 'mocov2-cifar10'"]),
        ("--train.bath-size 5", ["--train.bath-size", "did you mean --train.batch-size"]),
        ("--train.batch-size many", ["--train.batch-size", "many"]),
        ("--train.batch-size 0", ["--train.batch-size 0", "at least 1"]),
        ("mocov2-cifar10 --train.batch-size 100", ["--train.batch-size 100", "--model.splits 8", "multiple"]),
        ("--method.queue-size 64", ["--method.queue-size 64", "at least one batch"]),
        ("--method.temperature 0", ["--method.temperature 0", "above 0"]),
        ("--data.pipeline ffcv", ["ffcv", "--data.pipeline", "resident"]),
        ("--data.label-fraction 1.5", ["--data.label-fraction 1.5", "[0, 1]"]),
        ("quickstart extra", ["extra"]),
        ("--config /no/such/file", ["/no/such/file"]),
        ("--config", ["--config"]),
    ],
)
def test_bad_options_are_one_sentence(arguments, words):
    with pytest.raises(ConfigError) as error:
        parse(arguments.split())
    text = str(error.value)
    assert "\n" not in text
    assert not set(text) & set("│╭─")
    for word in words:
        assert word in text


def test_configuration_from_elsewhere_is_refused():
    for text in ("[]", "{}", "no json", '{"method": {"name": "byol"}}'):
        with pytest.raises(ConfigError):
            from_json(text)
    extra = to_json(load("quickstart")).replace('"seed"', '"sead"')
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        from_json(extra)


def test_learning_rate_follows_the_published_schedules():
    def rates(optim, steps_per_epoch=10, epochs=4):
        return [
            learning_rate(optim, step, total_steps=steps_per_epoch * epochs, steps_per_epoch=steps_per_epoch)
            for step in range(steps_per_epoch * epochs)
        ]

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


def test_train_options_are_checked():
    with pytest.raises(ConfigError, match=r"--train\.checkpoint-every 0"):
        TrainConfig(checkpoint_every=0)
