"""`fastssl bench`: measure the input, the training step, or both together."""

from __future__ import annotations

from importlib import import_module

from fastssl.errors import unknown_name

TASKS = {"input": "bench_input", "step": "bench_step", "e2e": "bench_end_to_end"}


def main(arguments: list[str]) -> int:
    """Run `fastssl bench input|step|e2e [PRESET] [...]`."""
    task, *rest = arguments or [""]
    if task not in TASKS:
        raise unknown_name("benchmark", task, TASKS)
    return import_module(f"fastssl.commands.{TASKS[task]}").main(rest)
