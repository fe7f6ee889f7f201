"""The command line."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from importlib import import_module
from typing import NoReturn, cast

from fastssl import __version__, plugins
from fastssl.errors import ConfigError, TrainingError, unknown_name
from fastssl_pipelines.errors import DataError, InputError
from fastssl_pipelines.names import printable

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130

# The module of fastssl.commands by command; its `main` takes the remaining arguments and returns the exit code
COMMANDS = {
    "pretrain": "pretrain",
    "resume": "resume",
    "eval": "evaluate",
    "plot": "plot",
    "report": "report",
    "data": "data_check",
    "preview": "preview",
    "bench": "bench",
    "methods": "methods",
    "presets": "presets",
    "verify": "verify",
    "slurm": "slurm",
    "doctor": "doctor",
}

USAGE = """\
usage: fastssl COMMAND [...]

  pretrain [PRESET] [--section.field VALUE ...]   train an encoder; alone: on embedded pictures, in minutes
  pretrain --config FILE [...]                    the same from the config.json of an earlier run
  resume RUN                                      continue a stopped run
  eval knn|linear RUN [...]                       accuracy of the frozen encoder, by kNN or a linear classifier
  plot RUN [RUN ...] [--out DIR]                  loss, accuracies, images/s and time shares as PNG files
  report RUN                                      the same plots and the configuration as an HTML file, RUN/report.html
  data check DIR [--quarantine LIST]              find unusable files before a long run does
  preview [PRESET] [--section.field VALUE ...]    a PNG of the views that training will see, with their parameters
  bench input [PRESET] [...]                      images/s of the input pipelines and of others
  bench step [PRESET] [...]                       the training step, its upper bound, the gap and its cause
  bench e2e [PRESET] [--section.field VALUE ...]  input and step together, and which is the bottleneck
  methods                                         the methods and their papers
  presets                                         the recipes and their published results
  verify [LOSS]                                   error of every loss against its definition, on this machine
  slurm                                           a template of a job script for two nodes that requeues itself
  doctor                                          versions, devices, what works here, and why the rest does not

`fastssl pretrain --help` lists the options of the quickstart, `fastssl pretrain PRESET --help` those of a preset.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; report bad input in one sentence on stderr with exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(arguments)
    except (ConfigError, DataError) as error:
        _report(error)
        return EXIT_BAD_INPUT
    except (TrainingError, InputError) as error:
        _report(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        _report("interrupted")
        return EXIT_INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        _report(
            f"memory ran out ({_first_line(error)}); lower --train.batch-size, --method.queue-size or --data.workers"
        )
        return EXIT_FAILED


def _report(error: Exception | str) -> None:
    rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(printable(f"fastssl{rank}: {error}"), file=sys.stderr)


def _is_about_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError is only for GPUs; on a CPU it is a plain RuntimeError
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def command() -> NoReturn:
    """The `fastssl` program: run `main` and exit the process."""
    for stream in (sys.stdout, sys.stderr):
        # A name may contain characters that the terminal's encoding lacks
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    code = main()
    from fastssl.train.signals import EXIT_STOPPED, ignore_requests

    if code == EXIT_STOPPED:
        ignore_requests()  # The exit code is already decided
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    if any(argument == "" or argument.endswith("=") for argument in arguments):
        # As a path it would mean the current folder
        raise ConfigError("an argument is empty, perhaps from a variable that is not set; give every option its value")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else EXIT_BAD_INPUT
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        raise unknown_name("command", command, COMMANDS)
    if importlib.util.find_spec("fcntl") is None:
        raise ConfigError(
            f"fastssl {command} needs a POSIX system, such as Linux, and this is {sys.platform}; only the losses "
            "(import fastssl_kernels) work here"
        )
    plugins.load()
    # Only this command is imported, so that it does not wait for the imports of others
    module = import_module(f"fastssl.commands.{COMMANDS[command]}")
    return module.main(rest)
