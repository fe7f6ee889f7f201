"""The command: its options, what is left to do, and the files that it keeps."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from fastssl.arguments import parse
from fastssl.errors import ConfigError
from fastssl.validation import Checked, Range
from fastssl_pipelines.files import write_atomic

from . import runner, summary
from .plan import FAILED, PARTS, Part, chosen, left_to_do, seconds_for

EXIT_FAILED = 1
LEAST_S = 3.0  # a part that gets less has no chance
AROUND_S = 4.0  # of the budget, for the import of torch before and the files after
Records = dict[str, runner.Record]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Proves on a GPU, part by part, what this project promises, or rehearses that on a CPU.

    A second call with the same --out goes on: what has passed stays, and what failed or ran out of time is tried again.
    """

    budget_minutes: Annotated[float, Range(above=0, most=24 * 60)] = 10.0
    """of the whole call; each part has its share"""
    out: Path = Path("bench/results/gpu")
    """folder for summary.md, results.json and a JSON file a part in `parts`"""
    only: tuple[str, ...] = ()
    """names of the parts to run; by default all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where torch finds it"""
    data: Path | None = None
    """photographs to learn from: a folder with train and test, or a .tar file of one; by default the project's"""


def main(arguments: Sequence[str]) -> int:
    """Run what is left to do, print a line a part and the targets; EXIT_FAILED if a part did not pass."""
    started = time.monotonic()
    options = parse(Options, arguments, prog="python -m bench gpu")
    parts, device = chosen(options.only), _device(options.device)
    records = _read(options.out)
    deadline = started + 60 * options.budget_minutes - AROUND_S
    with runner.ended_by_sigterm():
        _run(left_to_do(parts, records, device), records, options, device, deadline)
    print(summary.targets_as_text(records, device))
    print(f"written: {options.out / 'summary.md'}")
    return (
        EXIT_FAILED
        if any(record["status"] == FAILED for record in records.values() if record["device"] == device)
        else 0
    )


def _run(todo: list[Part], records: Records, options: Options, device: str, deadline: float) -> None:
    _write(options.out, records, device)  # an --out that cannot be written is told before minutes of work
    for number, part in enumerate(todo):
        seconds = seconds_for(part, todo[number + 1 :], deadline - time.monotonic())
        if seconds < LEAST_S:
            print(f"the budget of {options.budget_minutes:g} minutes is used up; call again to go on with {part.name}")
            return
        print(f"{part.name}: {part.title}, {seconds:.0f} s at most", file=sys.stderr, flush=True)
        earlier = records.get(part.name)
        same = earlier if earlier and earlier["device"] == device else None
        record = runner.run_part(part, device, options.data, seconds=seconds, earlier=same)
        records[part.name] = record
        _write(options.out, records, device)
        print(f"{part.name:<12} {record['status']:<8} {record['seconds']:6.1f} s  {summary.remark(record)}", flush=True)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was given and torch finds no GPU here; `fastssl doctor` tells more")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _read(out: Path) -> Records:
    """The records of earlier calls; a file that is none is as good as none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return {record["part"]: record for record in json.loads((out / "results.json").read_text())["parts"]}
    return {}


def _write(out: Path, records: Records, device: str) -> None:
    """All of it again: the file of each part, results.json with all of them, and the summary."""
    in_order = [records[part.name] for part in PARTS if part.name in records]
    files: dict[str, Any] = {f"parts/{record['part']}.json": record for record in in_order}
    files["results.json"] = {"device": device, "targets": summary.verdicts(records, device), "parts": in_order}
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(out / name, json.dumps(content, indent=1).encode())
        write_atomic(out / "summary.md", summary.markdown(in_order, device).encode())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written to ({error.strerror}); give another folder with --out") from None
