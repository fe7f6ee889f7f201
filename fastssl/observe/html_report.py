"""A run's report as one self-contained HTML file; needs no network and no plotting library."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastssl.observe import svg as chart
from fastssl.observe.history import METRICS, History, Metric, read_history
from fastssl.observe.summary import ADVICE, commands, entries, headlines, mean_shares, notable_parts, state
from fastssl_pipelines.files import write_atomic
from fastssl_pipelines.names import printable

DETAILS = (
    Metric("learning_rate", "train", "lr", "learning rate"),
    Metric("gradient_norm", "train", "gradient_norm", "gradient norm"),
)

_STYLE = """\
:root { color-scheme: light dark; --paper: #f7f7f5; --card: #fff; --ink: #1d2025; --faint: #646b74; --edge: #e2e3e5;
  --line: #0067a5; --alarm: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1e2125; --ink: #e7e8ea; --faint: #9aa1aa;
  --edge: #33373d; --line: #62b5ec; --alarm: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
.faint { color: var(--faint); }
.alarm td { color: var(--alarm); }
.numbers, .charts { display: grid; gap: .9rem; }
.numbers { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); margin-top: 1.4rem; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.card, pre { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: .8rem 1rem; }
.value { font-size: 1.45rem; font-weight: 600; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .45rem; }
table { border-collapse: collapse; }
td { padding: .2rem 1.4rem .2rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
tr + tr td { border-top: 1px solid var(--edge); }
pre { margin: .5rem 0; overflow: auto; }
summary { cursor: pointer; margin: .6rem 0; }
"""


def write_report(folder: Path) -> Path:
    """Write FOLDER/report.html from the readable records there and return its path.

    ConfigError for a folder without metrics.jsonl; OSError if the file cannot be written.
    """
    path = folder / "report.html"
    write_atomic(path, page(read_history(folder)).encode("utf-8", "replace"))
    return path


def escape(text: str) -> str:
    """Escape text for the page, including unprintable characters of file names."""
    return html.escape(printable(text))


def page(history: History) -> str:
    """The whole HTML page."""
    name = escape(history.name)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>'
    body = [
        f'<h1>{name}</h1><p class="faint">{escape(_subject(history))}</p><p>{escape(state(history))}</p>',
        *_numbers(history),
        *_charts(history),
        *_time(history),
        *_entries(history),
        "<h2>Commands</h2>",
        *(f'<p class="faint">{purpose}</p><pre>{escape(command)}</pre>' for purpose, command in commands(history)),
        "<h2>Configuration and environment</h2>",
        *_details("config.json", _flat(history.config)),
        *_details("env.json", history.environment.items()),
    ]
    style = f"<style>\n{_STYLE}{chart.STYLE}</style>"
    return "\n".join(
        ["<!doctype html>", f'<html lang="en"><head>{head}{style}</head><body>', *body, "</body></html>", ""]
    )


def _subject(history: History) -> str:
    """The method, the encoder and the training images."""
    pictures = history.setting("data.pictures")
    images = history.setting("data.root") or (f"{pictures} procedural pictures" if pictures else None)
    known = history.setting("method.name"), history.setting("model.encoder"), images
    return ", ".join(str(value) for value in known if value)


def _numbers(history: History) -> Iterator[str]:
    yield '<div class="numbers">'
    for title, value, remark in headlines(history):
        text = f'<div class="faint">{escape(title)}</div><div class="value">{escape(value)}</div>'
        yield f'<div class="card">{text}<div class="faint">{escape(remark)}</div></div>'
    yield "</div>"


def _charts(history: History) -> Iterator[str]:
    yield '<h2>Over the steps</h2><div class="charts">'
    for metric in (*METRICS, *DETAILS):
        if series := history.series(metric):
            picture = chart.line_chart(series, title=metric.title, from_zero=metric.from_zero)
            yield f'<div class="card"><h3>{escape(metric.title)}</h3>{picture}</div>'
    yield "</div>"
    if missing := [metric.title for metric in METRICS if not history.series(metric)]:
        yield f'<p class="faint">Not logged so far: {escape(", ".join(missing))}.</p>'


def _time(history: History) -> Iterator[str]:
    """Where the time of a step goes, and how to reduce it."""
    shares, means = history.shares(), mean_shares(history)
    if not means:
        return
    picture = chart.stacked_chart(shares, title="shares of the time")
    yield '<h2>What slowed the run</h2><div class="charts">'
    yield f'<div class="card"><h3>shares of the time</h3>{picture}</div><div class="card"><table>'
    for part, share in means.items():
        swatch = f'<span class="swatch" style="background: {part.color}"></span>'
        yield f"<tr><td>{swatch}{escape(part.title)}</td><td>{share:.1%}</td></tr>"
    yield "</table>"
    for part in notable_parts(means):
        yield f"<p><b>{escape(part.title)}, {means[part]:.0%}:</b> {escape(ADVICE[part.name])}</p>"
    yield '<p class="faint">Means over the run, without its first log line.</p></div></div>'


def _entries(history: History) -> Iterator[str]:
    yield "<h2>Notes and warnings</h2>"
    found = entries(history)
    if not found:
        yield '<p class="faint">None.</p>'
        return
    yield "<table>"
    for step, text, alarm in found:
        when = "" if step is None else f"step {step:,}"
        yield f'<tr{" class=alarm" if alarm else ""}><td class="faint">{when}</td><td>{escape(text)}</td></tr>'
    yield "</table>"


def _details(title: str, rows: Iterable[tuple[str, Any]]) -> Iterator[str]:
    yield f"<details><summary>{escape(title)}</summary><table>"
    for name, value in rows:
        yield f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>"
    yield "</table></details>"


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names (data.label_fraction) and their values as JSON."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
