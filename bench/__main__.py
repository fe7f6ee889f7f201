"""`python -m bench`: which benchmark runs."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fastssl.commands import bench_input
from fastssl.errors import ConfigError, TrainingError, unknown_name
from fastssl_pipelines.errors import DataError

from . import learning, load, losses, training_step
from .gpu import proof

COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "losses": losses.main,
    "learning": learning.main,
    "step": training_step.main,
    "load": load.main,
    "gpu": proof.main,
    "input": bench_input.main,
}
USAGE = """\
usage: python -m bench COMMAND [...]

  losses    loss and gradient of a query against a queue, beside eager torch, torch.compile, flash attention and peers
  step      a MoCo training step beside lightly's and a plain loop
  learning  kNN of every method after the same short training on CIFAR-10 photographs
  gpu       all that a machine with a GPU can prove, in minutes and with a summary; on a CPU a rehearsal
  load      the first command of the README beside processes that only compute
  input     images/s of the input pipelines beside Pillow in a DataLoader and DALI's own random operators

`python -m bench COMMAND --help` lists its options.
"""


def main(arguments: list[str]) -> int:
    """Run a benchmark; bad input is told in one sentence on stderr with exit code 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise unknown_name("command", command, COMMANDS)
        result = COMMANDS[command](rest)
    except (ConfigError, DataError, TrainingError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
