"""Runs fastssl commands in separate processes without importing everything each time."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from contextlib import contextmanager

# This process imports once and forks a child for every command. The child exits right after `main` returns: what the
# exit code promises must be on disk by then. It stays a zombie until the next command, so that its id is not reused.
SERVER = """
import json, os, sys
import fastssl.commands.doctor, fastssl.train.trainer
import torch._dynamo, torchvision.models  # A run imports them for its encoder and its optimizer
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
    """Runs one fastssl command at a time, on one or several ranks; their output goes to `output`."""

    def __init__(self, output):
        command = [sys.executable, "-c", SERVER]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=environment
        )
        assert self.server.stdout.readline() == b"ready\n"

    def start(self, arguments, ranks=1):
        """Start a command; returns the process ids by rank."""
        return self.start_each([arguments] * ranks)

    def start_each(self, arguments_of_ranks):
        """As `start`, with arguments for each rank."""
        jobs = [*map(list, zip(arguments_of_ranks, environments(len(arguments_of_ranks)), strict=True))]
        self.server.stdin.write(json.dumps(jobs).encode() + b"\n")
        return json.loads(self.server.stdout.readline())

    def ended(self, within_s):
        """Whether all running processes end within that time."""
        return bool(select.select([self.server.stdout], [], [], within_s)[0])

    def exit_codes(self):
        """Wait for all processes; returns their exit codes, or minus the signal that killed them."""
        return json.loads(self.server.stdout.readline())

    def run(self, arguments, ranks=1):
        """Run a command to its end; returns the exit codes."""
        self.start(arguments, ranks)
        return self.exit_codes()


def environments(ranks):
    """The variables that torchrun sets, for each rank; none for a single rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


@contextmanager
def commands_into(path):
    """Commands whose output goes to a file."""
    with path.open("wb") as output:
        commands = Commands(output)
        yield commands
        commands.server.stdin.close()
        commands.server.wait(60)
