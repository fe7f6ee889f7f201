"""Small charts as inline SVG without a plotting library; the page's CSS sets the colors of text and lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from fastssl.observe.history import Part, Series

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 26  # Margins around the plotted area
BUCKETS = 250  # Points to which a long run is thinned
DOTS_AT_MOST = 40

STYLE = """\
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--faint); }
svg .grid { stroke: var(--edge); }
svg .line { fill: none; stroke: var(--line); stroke-width: 1.75; stroke-linejoin: round; }
svg .band { fill: var(--line); opacity: .25; }
svg .dot { fill: var(--line); }
"""


Point = tuple[float, float]
"""Step and value."""


class _Frame(NamedTuple):
    """The plotted area: the steps and values at its edges."""

    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def places(self, points: Iterable[Point]) -> str:
        return " ".join(f"{self.x(step):.1f},{self.y(value):.1f}" for step, value in points)

    def area(self, steps: Sequence[float], below: Sequence[float], above: Sequence[float]) -> str:
        there = zip(steps, below, strict=True)
        back = reversed(list(zip(steps, above, strict=True)))
        return self.places([*there, *back])


def line_chart(series: Series, *, title: str, from_zero: bool = False) -> str:
    """One line over the steps as an SVG element; a long series becomes means of neighbors with a min-max band.

    `series` holds at least one value, all finite.
    """
    values = list(series.values())
    low, high, ticks = nice_axis(min([0.0, *values] if from_zero else values), max(values))
    frame = _Frame(*_steps(series), low, high)
    buckets = _buckets(series)
    points = [_mean(bucket) for bucket in buckets]
    body = []
    if len(points) < len(series):
        ranges = [(min(values), max(values)) for values in ([value for _, value in bucket] for bucket in buckets)]
        least, most = zip(*ranges, strict=True)
        body.append(f'<polygon class="band" points="{frame.area([step for step, _ in points], least, most)}"/>')
    body.append(f'<polyline class="line" points="{frame.places(points)}"/>')
    if len(points) <= DOTS_AT_MOST:
        body += [_dot(frame, step, value) for step, value in points]
    return _svg(title, [*_grid(frame, ticks), *body])


def stacked_chart(shares: dict[Part, Series], *, title: str) -> str:
    """Stacked areas over the steps as an SVG element, the first at the bottom; a long run becomes means of neighbors.

    All series have the same steps, at least one, and add up to 1 at each step.
    """
    frame = _Frame(*_steps(next(iter(shares.values()))), 0.0, 1.0)
    columns = {part: [_mean(bucket) for bucket in _buckets(series)] for part, series in shares.items()}
    steps = [step for step, _ in next(iter(columns.values()))]
    if len(steps) == 1:  # A single point has no area
        steps = [frame.first, frame.last]
        columns = {part: column * 2 for part, column in columns.items()}
    below, body = [0.0] * len(steps), []
    for part, column in columns.items():
        above = [base + share for base, (_, share) in zip(below, column, strict=True)]
        name = f"<title>{escape(part.title)}</title>"
        body.append(f'<polygon fill="{part.color}" points="{frame.area(steps, below, above)}">{name}</polygon>')
        below = above
    return _svg(title, [*body, *_grid(frame, [0.0, 0.25, 0.5, 0.75, 1.0], percent=True)])


def nice_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis that contains [low, high]; ticks are multiples of 1, 2 or 5 times a power of ten."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # Practically equal
        half = 0.5 * max(abs(low), abs(high)) or 1.0
        low, high = low - half, high + half
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [step * i for i in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def _steps(series: Series) -> tuple[float, float]:
    first, last = min(series), max(series)
    return (first, last) if last > first else (first - 0.5, first + 0.5)


def _buckets(series: Series) -> list[list[tuple[int, float]]]:
    """Group neighbors into at most BUCKETS lists."""
    points, size = list(series.items()), math.ceil(len(series) / BUCKETS)
    return [points[i : i + size] for i in range(0, len(points), size)]


def _mean(bucket: list[tuple[int, float]]) -> Point:
    steps, values = zip(*bucket, strict=True)
    return sum(steps) / len(steps), sum(values) / len(values)


def _dot(frame: _Frame, step: float, value: float) -> str:
    title = f"<title>step {step:,}: {value:.4g}</title>"
    return f'<circle class="dot" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}" r="3">{title}</circle>'


def _grid(frame: _Frame, ticks: Sequence[float], *, percent: bool = False) -> list[str]:
    """Horizontal lines with their values, and the first and last step below."""
    drawn = []
    for tick in ticks:
        y = frame.y(tick)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = f"{tick:.0%}" if percent else f"{tick:,.6g}"
        drawn.append(f'<text text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{text}</text>')
    drawn += [
        f'<text x="{LEFT}" y="{HEIGHT - 6}">step {math.ceil(frame.first):,}</text>',
        f'<text text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}">{math.floor(frame.last):,}</text>',
    ]
    return drawn


def _svg(title: str, body: list[str]) -> str:
    name = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(body)}</svg>'
