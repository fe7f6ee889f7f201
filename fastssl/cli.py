"""The command line."""

from __future__ import annotations

import importlib.util
import io
import os
import sys
from importlib import import_module
from typing import NoReturn, cast

from fastssl import __version__
from fastssl.errors import ConfigError, TrainingError, unknown_name
from fastssl_pipelines.errors import DataError, InputError
from fastssl_pipelines.names import printable

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130

# by name, the module of fastssl.commands whose `main` takes the other arguments and returns the exit code
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
  resume RUN                                      go on with a stopped run
  eval knn|linear RUN [...]                       accuracy of the frozen encoder, by neighbors or a linear classifier
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
    from fastssl.train.signals import EXIT_STOPPED, ignore_requests

    if code == EXIT_STOPPED:
        ignore_requests()  # the exit code is settled
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
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
    if command not in COMMANDS:
        raise unknown_name("command", command, COMMANDS)
    if importlib.util.find_spec("fcntl") is None:
        raise ConfigError(
            f"fastssl {command} needs a POSIX system, such as Linux, and this is {sys.platform}; of fastssl only the "
            "losses (import fastssl_kernels) work here"
        )
    # the others are not imported, so that none waits for what another needs
    module = import_module(f"fastssl.commands.{COMMANDS[command]}")
    return module.main(rest)
