from __future__ import annotations

import pytest

from fastssl.commands.pretrain import parse
from fastssl.config import TrainConfig, from_json, to_json
from fastssl.errors import ConfigError
from fastssl.presets import load
from fastssl.renamed import current_facts


def test_command_line_options_reach_the_configuration(tmp_path):
    config = parse(
        f"unimoco-cifar10 --run.dir {tmp_path} --data.root /d --data.pipeline dali --data.label-fraction 0.3 "
        "--train.steps 5 --train.epochs 2 --train.batch-size 64 --seed 9 --method.queue-size 128".split()
    )
    assert (config.run.dir, str(config.data.root), config.data.pipeline) == (tmp_path, "/d", "dali")
    assert (config.data.label_fraction, config.train.steps, config.train.epochs) == (0.3, 5, 2)
    assert (config.train.batch_size, config.seed, config.method.queue_size) == (64, 9, 128)
    assert parse([]).preset == "quickstart"


def test_options_override_a_config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(to_json(parse(["mocov2-cifar10", "--optim.lr", "0.5", "--run.dir", "/a/run"])))
    config = parse(["--config", str(file), "--seed", "3"])
    assert (config.optim.lr, config.seed, config.method.name, config.run.dir) == (0.5, 3, "mocov2", None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("mocov2-cifra10", ["mocov2-cifra10", "did you mean 'mocov2-cifar10'"]),
        ("--train.bath-size 5", ["--train.bath-size", "did you mean '--train.batch-size'"]),
        ("--train.batch-size many", ["--train.batch-size", "many"]),
        ("--train.batch-size 0", ["--train.batch-size 0", "at least 1"]),
        ("mocov2-cifar10 --train.batch-size 100", ["--train.batch-size 100", "--model.splits 8", "multiple"]),
        ("--method.queue-size 64", ["--method.queue-size 64", "at least one batch"]),
        ("--method.temperature 0", ["--method.temperature 0", "at least 0.001"]),
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


def test_other_json_is_refused():
    for text in ("[]", "{}", "no json", '{"method": {"name": "byol"}}'):
        with pytest.raises(ConfigError):
            from_json(text)
    extra = to_json(load("quickstart")).replace('"seed"', '"sead"')
    with pytest.raises(ConfigError, match="did you mean 'seed'"):
        from_json(extra)


def test_train_options_are_checked():
    with pytest.raises(ConfigError, match=r"--train\.checkpoint-every 0"):
        TrainConfig(checkpoint_every=0)


def test_earlier_names_in_the_facts_of_a_checkpoint_are_read_and_damaged_ones_kept():
    facts = {"data.unlabelled": "more", "views": '[{"grey": 0.2}]', "eval_view": '{"centre": 1.0}', "seed": 0}
    current = {
        "data.unlabeled": "more",
        "views": '[{"grayscale": 0.2}]',
        "eval_view": '{"center_crop": 1.0}',
        "seed": 0,
    }
    assert current_facts(facts) == current
    damaged = {"views": "no JSON", "odd_views": "[" * 10**5}
    assert current_facts(damaged) == damaged
