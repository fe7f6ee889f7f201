"""Runs fastssl commands in processes of their own, without the seconds that an import takes each time."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from contextlib import contextmanager

# This process imports once and forks a child for every command. The child is a process like any other, but for its end:
# what a command promises with its exit code must be on the disk when `main` returns. Until the next commands it stays a
# zombie, which keeps its number from being given to somebody else.
SERVER = """
import json, os, sys
import fastssl.commands.doctor, fastssl.train.trainer
import torch._dynamo, torchvision.models  # which a run imports for its encoder and its optimizer
from fastssl.cli import main

assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"

def start(arguments, environment):
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        os.environ.update(environment)
        code = main(arguments)
        sys.stdout.flush()
        os._exit(code)
    return child

def end_of(child):
    end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

print("ready", flush=True)
children = []
for line in sys.stdin:
    for child in children:
        os.waitpid(child, 0)
    children = [start(*job) for job in json.loads(line)]
    print(json.dumps(children), flush=True)
    print(json.dumps([end_of(child) for child in children]), flush=True)
"""


class Commands:
    """Runs one fastssl command at a time, or one as several ranks; what they print goes into `output`."""

    def __init__(self, output):
        command = [sys.executable, "-c", SERVER]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=environment
        )
        assert self.server.stdout.readline() == b"ready\n"

    def start(self, arguments, ranks=1):
        """Returns the process ids, rank by rank."""
        return self.start_each([arguments] * ranks)

    def start_each(self, arguments_of_ranks):
        """As `start`, with arguments for each rank."""
        jobs = [*map(list, zip(arguments_of_ranks, environments(len(arguments_of_ranks)), strict=True))]
        self.server.stdin.write(json.dumps(jobs).encode() + b"\n")
        return json.loads(self.server.stdout.readline())

    def ended(self, within_s):
        """Whether all processes at hand end so soon."""
        return bool(select.select([self.server.stdout], [], [], within_s)[0])

    def exit_codes(self):
        """Of the processes at hand, when they have ended: minus the signal that killed it, or what it returned."""
        return json.loads(self.server.stdout.readline())

    def run(self, arguments, ranks=1):
        """The exit codes of a command that is left alone."""
        self.start(arguments, ranks)
        return self.exit_codes()


def environments(ranks):
    """What torchrun sets, one a rank; nothing for one alone."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(ranks)]


@contextmanager
def commands_into(path):
    """Commands whose output goes into a file."""
    with path.open("wb") as output:
        commands = Commands(output)
        yield commands
        commands.server.stdin.close()
        commands.server.wait(60)
