"""The command line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import NoReturn, cast

from fastssl import __version__
from fastssl.arguments import parse as parse_options
from fastssl.arguments import parse_known
from fastssl.config import Config, RunConfig, from_json
from fastssl.errors import ConfigError, TrainingError, unknown_name
from fastssl.methods import METHODS
from fastssl.presets import load
from fastssl_pipelines.errors import DataError, InputError
from fastssl_pipelines.names import printable

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130

USAGE = """\
usage: fastssl COMMAND [...]

  pretrain [PRESET] [--section.field VALUE ...]   train an encoder; alone: on embedded pictures, in minutes
  pretrain --config FILE [...]                    the same from the config.json of an earlier run
  resume RUN                                      go on with a stopped run
  eval knn|linear RUN [...]                       accuracy of the frozen encoder, by neighbours or a linear classifier
  plot RUN [RUN ...] [--out DIR]                  loss, accuracies, images/s and shares of time as PNG files
  report RUN                                      the same and the configuration as one HTML file, RUN/report.html
  data check DIR [--quarantine LIST]              find files that training cannot use before a long run does
  preview [PRESET] [--section.field VALUE ...]    a PNG of the views that training will see, with their numbers
  bench input [PRESET] [...]                      images/s of the input pipelines beside what others use
  bench step [PRESET] [...]                       the training step, its ceiling, the gap and its cause
  bench e2e [PRESET] [--section.field VALUE ...]  real input and step together, and which of them holds the other up
  methods                                         the methods and their papers
  presets                                         the recipes and their published results
  verify [LOSS]                                   how far every loss is from its definition, on this machine
  slurm                                           a job script for two nodes that requeues itself, to be changed
  doctor                                          versions, devices, what works here and why not

`fastssl pretrain --help` lists the options of the quickstart, `fastssl pretrain PRESET --help` those of a preset.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; bad input is told in one sentence on stderr with exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(arguments)
    except (ConfigError, DataError) as error:
        _tell(error)
        return EXIT_BAD_INPUT
    except (TrainingError, InputError) as error:
        _tell(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        _tell("interrupted")
        return EXIT_INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        _tell(f"memory ran out ({_first_line(error)}); lower --train.batch-size, --method.queue-size or --data.workers")
        return EXIT_FAILED


def _tell(error: Exception | str) -> None:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(printable(f"fastssl{rank}: {error}"), file=sys.stderr)


def _is_about_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError is that of a GPU; a CPU's is a RuntimeError like any other
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def command() -> NoReturn:
    """The `fastssl` program: `main` as the whole of a process."""
    for stream in (sys.stdout, sys.stderr):
        # a name can hold what the terminal's encoding has no letter for
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    code = main()
    from fastssl.train.interrupt import EXIT_STOPPED, ignore_requests

    if code == EXIT_STOPPED:
        ignore_requests()  # the exit code is settled
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "pretrain": pretrain,
        "resume": resume,
        "eval": evaluate,
        "plot": plot,
        "report": report,
        "data": data,
        "preview": preview,
        "bench": bench,
        "methods": methods,
        "presets": presets,
        "verify": verify,
        "slurm": slurm,
        "doctor": doctor,
    }
    if any(argument == "" or argument.endswith("=") for argument in arguments):
        # a path would be the current folder
        raise ConfigError("an argument is empty, as of a variable that is not set; give every option its value")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else EXIT_BAD_INPUT
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *rest = arguments
    if command not in commands:
        raise unknown_name("command", command, commands)
    if importlib.util.find_spec("fcntl") is None:
        raise ConfigError(
            f"fastssl {command} needs a POSIX system, such as Linux, and this is {sys.platform}; of fastssl only the "
            "losses (import fastssl_kernels) work here"
        )
    return commands[command](rest)


def pretrain(arguments: list[str]) -> int:
    """`fastssl pretrain [PRESET | --config FILE] [--section.field VALUE ...]`."""
    config = parse(arguments)
    # resume may be called from another folder
    config = replace(config, data=config.data.absolute())
    return _train(config, config.run.dir, new=True)


def parse(arguments: list[str]) -> Config:
    """The configuration that the arguments of `pretrain` ask for."""
    if arguments[:1] == ["--config"]:
        from fastssl.train.folder import config_text

        if len(arguments) < 2:
            raise ConfigError("--config was given without a file; name the config.json of a run")
        # not the folder that the file comes from: it holds a run
        default = replace(from_json(config_text(Path(arguments[1]))), run=RunConfig())
        rest, prog = arguments[2:], "fastssl pretrain --config FILE"
    else:
        named = bool(arguments) and not arguments[0].startswith("-")
        name = arguments[0] if named else "quickstart"
        default, rest, prog = load(name), arguments[named:], f"fastssl pretrain {name}"
    given = {argument.split("=")[0].replace("_", "-") for argument in rest}
    if "--data.label-list" in given and "--data.label-fraction" not in given:
        # the list takes the place of the preset's share
        default = replace(default, data=replace(default.data, label_fraction=1.0))
    return parse_options(Config, rest, prog=prog, default=default)


def resume(arguments: list[str]) -> int:
    """`fastssl resume RUN`."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError(f"resume takes one run folder, and {len(arguments)} arguments were given: fastssl resume RUN")
    from fastssl.train.folder import read_config

    folder = Path(arguments[0])
    return _train(from_json(read_config(folder)), folder, new=False)


def _train(config: Config, folder: Path | None, *, new: bool) -> int:
    # imported here so that the other commands do not wait for it
    from fastssl.train.device import choose_device
    from fastssl.train.distributed import from_first_rank, joined_ranks, rank
    from fastssl.train.folder import claimed, new_folder, prepare, taken
    from fastssl.train.trainer import Trainer

    with contextlib.ExitStack() as stack:
        stack.enter_context(joined_ranks(choose_device(config.train), timeout_s=config.train.timeout_s))
        if folder is None:
            # the first rank's, as the name has the time in it
            folder = Path(from_first_rank(lambda: str(stack.enter_context(new_folder(config.preset)))))
        elif new and (folder / "config.json").exists():
            raise taken(folder)
        trainer = Trainer(config, folder)
        if rank() > 0:
            return trainer.train()
        claim = stack.enter_context(claimed(folder))
        prepare(folder, config, identity=trainer.identity, new=new)
        code = trainer.train(claim)
        claim.require()
        return code


def evaluate(arguments: list[str]) -> int:
    """`fastssl eval knn|linear RUN [--option VALUE ...]`."""
    from fastssl.evaluate.command import KNNOptions, LinearOptions, eval_knn, eval_linear

    protocol, *rest = arguments or [""]
    if protocol == "knn":
        return eval_knn(parse_options(KNNOptions, rest, prog="fastssl eval knn"))
    if protocol == "linear":
        return eval_linear(parse_options(LinearOptions, rest, prog="fastssl eval linear"))
    raise unknown_name("evaluation", protocol, ["knn", "linear"])


def plot(arguments: list[str]) -> int:
    """`fastssl plot RUN [RUN ...] [--out DIR]`."""
    from fastssl.observe.plot import Options, run

    return run(parse_options(Options, arguments, prog="fastssl plot"))


def report(arguments: list[str]) -> int:
    """`fastssl report RUN`."""
    from fastssl.observe.report import Options, run

    return run(parse_options(Options, arguments, prog="fastssl report"))


def data(arguments: list[str]) -> int:
    """`fastssl data check DIR [--quarantine LIST] [--workers N]`."""
    from fastssl.check import Options, run

    task, *rest = arguments or [""]
    if task != "check":
        raise unknown_name("task for data", task, ["check"])
    return run(parse_options(Options, rest, prog="fastssl data check"))


def preview(arguments: list[str]) -> int:
    """`fastssl preview [PRESET | --config FILE] [--images N] [--step N] [--out FILE] [--section.field VALUE ...]`."""
    from fastssl.preview import Options, run

    options, rest = parse_known(Options, arguments, prog="fastssl preview")
    return run(parse(rest), options)


def bench(arguments: list[str]) -> int:
    """`fastssl bench input|step [PRESET] [--option VALUE ...]` or `e2e [PRESET] [--section.field VALUE ...]`."""
    task, *rest = arguments or [""]
    if task == "input":
        from fastssl.benchmark import input as input_benchmark

        return input_benchmark.run(parse_options(input_benchmark.Options, rest, prog="fastssl bench input"))
    if task == "step":
        from fastssl.benchmark import step

        return step.run(parse_options(step.Options, rest, prog="fastssl bench step"))
    if task == "e2e":
        from fastssl.benchmark import end_to_end

        options, rest = parse_known(end_to_end.Options, rest, prog="fastssl bench e2e")
        return end_to_end.run(parse(rest), options)
    raise unknown_name("benchmark", task, ["input", "step", "e2e"])


def methods(arguments: list[str]) -> int:
    """`fastssl methods`."""
    _no_arguments(arguments)
    for name, cls in METHODS.items():
        print(f"{name:<12} {cls.Config.paper:<18} {(cls.__doc__ or '').splitlines()[0]}")
    return 0


def presets(arguments: list[str]) -> int:
    """`fastssl presets`."""
    from fastssl.presets.listing import listing

    _no_arguments(arguments)
    sys.stdout.write(listing())  # at once, so that `| head` does not break it off
    return 0


def verify(arguments: list[str]) -> int:
    """`fastssl verify [LOSS] [--device D] [--dtype D]`."""
    from fastssl.verify import Options, run

    return run(parse_options(Options, arguments, prog="fastssl verify"))


def slurm(arguments: list[str]) -> int:
    """`fastssl slurm`."""
    _no_arguments(arguments)
    sys.stdout.write(resources.files("fastssl").joinpath("pretrain.sbatch").read_text())
    return 0


def doctor(arguments: list[str]) -> int:
    """`fastssl doctor`."""
    from fastssl.doctor import report

    _no_arguments(arguments)
    for title, rows in report():
        print(title)
        for name, value in rows:
            print(f"  {name:<22} {value}")
    return 0


def _no_arguments(arguments: list[str]) -> None:
    if arguments:
        raise ConfigError(f"this command takes no arguments, and {' '.join(arguments)} was given")
