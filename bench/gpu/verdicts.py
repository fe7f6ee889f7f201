"""Compare the records with the targets: met, missed or not measured, as Markdown and for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from .parts import FAILED, PARTS, SKIPPED, TIMEOUT
from .targets import TARGETS, Target

Record = Mapping[str, Any]


def verdicts(records: Mapping[str, Record], device: str) -> list[dict[str, Any]]:
    """A row per target: the measured value, and in words whether it meets the limit."""
    return [_verdict(target, records.get(target.part), device) for target in TARGETS]


def _verdict(target: Target, record: Record | None, device: str) -> dict[str, Any]:
    limit = f"{'at most' if target.at_most else 'at least'} {target.limit:g} {target.unit}"
    row = {"target": target.text, "limit": limit, "measured": None}
    if device == "cpu":
        return row | {"verdict": "needs a GPU"}
    value = target.measured(record["numbers"]) if record and record["device"] == device else None
    if value is None:
        why = f"part {target.part} {record['status']}" if record else f"part {target.part} has not run"
        return row | {"verdict": f"not measured: {why}"}
    margin = f"{abs(target.margin(value)):.0%}"
    words = f"met, {margin} better" if target.met(value) else f"missed by {margin}"
    return row | {"measured": value, "verdict": words}


def remark(record: Record) -> str:
    """Why a part did not pass, or the names of its results."""
    if record["status"] == SKIPPED:
        return record["reason"]
    if record["errors"]:
        name, error = next(iter(record["errors"].items()))
        more = len(record["errors"]) - 1
        return f"{name}: {error}" + (f" (and {more} more)" if more else "")
    if record["status"] == FAILED:
        return f"exit code {record['exit_code']}; its output ends with: {_last_line(record)}"
    measured = textwrap.shorten(", ".join(record["numbers"]), 90, placeholder=" ...")
    return f"timed out after {measured or 'nothing'}" if record["status"] == TIMEOUT else measured


def _last_line(record: Record) -> str:
    return next((line.strip() for line in reversed(record["tail"].splitlines()) if line.strip()), "nothing")[:200]


def targets_as_text(records: Mapping[str, Record], device: str) -> str:
    """A line per target."""
    return "\n".join(
        f"  {row['target']}, {row['limit']}: {_shown(row)}{row['verdict']}" for row in verdicts(records, device)
    )


def _shown(row: Mapping[str, Any]) -> str:
    return "" if row["measured"] is None else f"{row['measured']:.4g}, "


def markdown(records: Sequence[Record], device: str) -> str:
    """The summary: targets, parts, results, and the output of parts that did not pass."""
    by_name = {record["part"]: record for record in records}
    kind = "Proof on a GPU" if device == "cuda" else "Rehearsal on a CPU: small sizes, speeds mean nothing"
    lines = [
        f"# python -m bench gpu: {kind}",
        "",
        "| target | limit | measured | verdict |",
        "| --- | --- | --- | --- |",
    ]
    for row in verdicts(by_name, device):
        lines.append(f"| {row['target']} | {row['limit']} | {_shown(row).rstrip(', ')} | {row['verdict']} |")
    lines += ["", "| part | status | s | |", "| --- | --- | --- | --- |"]
    for part in PARTS:
        if record := by_name.get(part.name):
            cells = [part.title, record["status"], f"{record['seconds']:.1f}", _cell(remark(record))]
        else:
            cells = [part.title, "not run", "", "call again with the same --out"]
        lines.append(f"| {' | '.join(cells)} |")
    for record in records:
        lines += ["", f"## {record['title']}", "", f"`{record['command']}` on {record['device']}", ""]
        lines += [f"- {name}: {_cell(_brief(value))}" for name, value in record["numbers"].items()]
        lines += [f"- **{name}**: {_cell(error)}" for name, error in record["errors"].items()]
        if record["status"] in (FAILED, TIMEOUT):
            lines += ["", "```", record["tail"][-2000:].replace("```", "'''"), "```"]
    return "\n".join([*lines, ""])


def _brief(value: Any) -> str:
    """Floats with four digits; a long list becomes its length, as results.json has all of it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_brief(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return f"[{len(value)} rows]" if len(value) > 8 or any(map(_is_nested, value)) else " ".join(map(_brief, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | Mapping)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
