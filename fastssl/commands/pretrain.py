"""`fastssl pretrain`: train an encoder from a preset, or a config.json, and options."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

from fastssl.arguments import parse as parse_options
from fastssl.config import Config, RunConfig, from_json
from fastssl.device import choose_device
from fastssl.distributed import from_first_rank, joined_ranks, rank
from fastssl.errors import ConfigError
from fastssl.observe.notes import NoteQueue
from fastssl.presets import load
from fastssl.run_folder import claimed, config_text, new_folder, prepare, taken


def main(arguments: list[str]) -> int:
    """`fastssl pretrain [PRESET | --config FILE] [--section.field VALUE ...]`."""
    config = parse(arguments)
    # A run may be resumed from another folder
    config = replace(config, data=config.data.absolute())
    return train(config, config.run.dir, new=True)


def parse(arguments: list[str]) -> Config:
    """Build the configuration from the arguments of `pretrain`."""
    if arguments[:1] == ["--config"]:
        if len(arguments) < 2:
            raise ConfigError("--config was given without a file; name the config.json of a run")
        # The folder of the file already holds a run
        default = replace(from_json(config_text(Path(arguments[1]))), run=RunConfig())
        rest, prog = arguments[2:], "fastssl pretrain --config FILE"
    else:
        named = bool(arguments) and not arguments[0].startswith("-")
        name = arguments[0] if named else "quickstart"
        default, rest, prog = load(name), arguments[named:], f"fastssl pretrain {name}"
    given = {argument.split("=")[0].replace("_", "-") for argument in rest}
    if "--data.label-list" in given and "--data.label-fraction" not in given:
        # The list replaces the preset's label fraction
        default = replace(default, data=replace(default.data, label_fraction=1.0))
    return parse_options(Config, rest, prog=prog, default=default)


def train(config: Config, folder: Path | None, *, new: bool) -> int:
    """Train in `folder`, by default a new one; returns the exit code."""
    from fastssl.train.trainer import Trainer  # Late, as it is slow to import and --help does not need it

    with contextlib.ExitStack() as stack:
        stack.enter_context(joined_ranks(choose_device(config.train), timeout_s=config.train.timeout_s))
        if folder is None:
            # The first rank decides, as the name contains the time
            folder = Path(from_first_rank(lambda: str(stack.enter_context(new_folder(config.preset)))))
        elif new and (folder / "config.json").exists():
            raise taken(folder)
        trainer = Trainer(config, folder, stack.enter_context(NoteQueue()))
        if rank() > 0:
            return trainer.train()
        claim = stack.enter_context(claimed(folder))
        prepare(folder, config, identity=trainer.identity, new=new)
        code = trainer.train(claim)
        claim.require()
        return code
