"""The command `python -m bench gpu`: its options, its loop over the parts, and its files."""

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

from . import part_runner, verdicts
from .parts import FAILED, PARTS, Part, chosen, left_to_do, seconds_for

EXIT_FAILED = 1
LEAST_S = 3.0  # No part can finish in less
AROUND_S = 4.0  # Of the budget, for importing torch and writing the files
Records = dict[str, part_runner.Record]


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Check on a GPU, part by part, what this project promises, or rehearse that on a CPU.

    A second call with the same --out continues: it keeps what passed and retries what failed or timed out.
    """

    budget_minutes: Annotated[float, Range(above=0, most=24 * 60)] = 10.0
    """for the whole call; each part gets a share"""
    out: Path = Path("bench/results/gpu")
    """folder for summary.md, results.json and a JSON file per part in `parts`"""
    only: tuple[str, ...] = ()
    """parts to run; by default all"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if torch finds it"""
    data: Path | None = None
    """photographs to learn from: a folder with train and test, or a .tar file of one; by default from shared/data"""


def main(arguments: Sequence[str]) -> int:
    """Run what is left to do, print a line per part and the targets; EXIT_FAILED if a part failed."""
    started = time.monotonic()
    options = parse(Options, arguments, prog="python -m bench gpu")
    parts, device = chosen(options.only), _device(options.device)
    records = _read(options.out)
    deadline = started + 60 * options.budget_minutes - AROUND_S
    with part_runner.ended_by_sigterm():
        _run(left_to_do(parts, records, device), records, options, device, deadline)
    print(verdicts.targets_as_text(records, device))
    print(f"written: {options.out / 'summary.md'}")
    failed = any(record["status"] == FAILED for record in records.values() if record["device"] == device)
    return EXIT_FAILED if failed else 0


def _run(todo: list[Part], records: Records, options: Options, device: str, deadline: float) -> None:
    _write(options.out, records, device)  # Fail early if --out cannot be written
    for index, part in enumerate(todo):
        seconds = seconds_for(part, todo[index + 1 :], deadline - time.monotonic())
        if seconds < LEAST_S:
            print(
                f"the budget of {options.budget_minutes:g} minutes is used up; call again to continue with {part.name}"
            )
            return
        print(f"{part.name}: {part.title}, {seconds:.0f} s at most", file=sys.stderr, flush=True)
        earlier = records.get(part.name)
        same = earlier if earlier and earlier["device"] == device else None
        record = part_runner.run_part(part, device, options.data, seconds=seconds, earlier=same)
        records[part.name] = record
        _write(options.out, records, device)
        outcome = f"{record['status']:<8} {record['seconds']:6.1f} s  {verdicts.remark(record)}"
        print(f"{part.name:<12} {outcome}", flush=True)


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda was given and torch finds no GPU here; `fastssl doctor` says more")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _read(out: Path) -> Records:
    """The records of earlier calls; a file that cannot be read counts as none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return {record["part"]: record for record in json.loads((out / "results.json").read_text())["parts"]}
    return {}


def _write(out: Path, records: Records, device: str) -> None:
    """Write the file of each part, results.json with all of them, and the summary."""
    in_order = [records[part.name] for part in PARTS if part.name in records]
    files: dict[str, Any] = {f"parts/{record['part']}.json": record for record in in_order}
    files["results.json"] = {"device": device, "targets": verdicts.verdicts(records, device), "parts": in_order}
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(out / name, json.dumps(content, indent=1).encode())
        write_atomic(out / "summary.md", verdicts.markdown(in_order, device).encode())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written to ({error.strerror}); give another folder with --out") from None
