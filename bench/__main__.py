"""`python -m bench`: run a benchmark by name."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fastssl import plugins
from fastssl.commands import bench_input
from fastssl.errors import ConfigError, TrainingError, unknown_name
from fastssl_pipelines.errors import DataError

from . import learning, load, loss_timing, training_step
from .gpu import proof

COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "losses": loss_timing.main,
    "learning": learning.main,
    "step": training_step.main,
    "load": load.main,
    "gpu": proof.main,
    "input": bench_input.main,
}
USAGE = """\
usage: python -m bench COMMAND [...]

  losses    loss and gradient of queries against a queue: fastssl, eager torch, torch.compile, flash attention, peers
  step      a MoCo training step: fastssl, lightly and a plain loop
  learning  kNN of every method after the same short training on CIFAR-10 photographs
  gpu       tests, accuracy and speed on a GPU within a time budget, with a summary; on a CPU a rehearsal
  load      images/s of the quickstart while other processes compute
  input     images/s of the input pipelines, of Pillow in a DataLoader and of DALI's own random operators

`python -m bench COMMAND --help` lists its options.
"""


def main(arguments: list[str]) -> int:
    """Run a benchmark; report bad input in one sentence on stderr and return 2."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, *rest = arguments
    try:
        if command not in COMMANDS:
            raise unknown_name("command", command, COMMANDS)
        plugins.load()
        result = COMMANDS[command](rest)
    except (ConfigError, DataError, TrainingError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
