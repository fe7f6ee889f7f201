"""`fastssl plot`: plot the metrics of runs as PNG files, one line per run. Needs the extra `plots`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastssl.arguments import Positional, parse
from fastssl.errors import ConfigError
from fastssl.observe.history import METRICS, History, Metric, Part, Series, read_history
from fastssl.validation import Checked
from fastssl_pipelines.errors import install_command
from fastssl_pipelines.names import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

_INCHES = (7.0, 4.0)
_DOTS_AT_MOST = 40


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Plots loss, contrast accuracy, kNN accuracy, images/s and the shares of the time of runs as PNG files."""

    runs: Annotated[tuple[Path, ...], Positional]
    """run folders; several are plotted together"""
    out: Path | None = None
    """output folder; by default the run folder, or the current folder for several runs"""


def main(arguments: list[str]) -> int:
    """Run `fastssl plot RUN [RUN ...] [--out DIR]`."""
    return run(parse(Options, arguments, prog="fastssl plot"))


def run(options: Options) -> int:
    """Write the plots, print their paths and return 0.

    ConfigError if there is nothing to plot, no matplotlib, or no writable folder.
    """
    if not options.runs:
        raise ConfigError("no run folder was given, and plot takes one or more: fastssl plot RUN [RUN ...]")
    histories = [read_history(folder) for folder in options.runs]
    _require_matplotlib()
    pictures = {f"{metric.picture}.png": _metric_picture(histories, metric) for metric in METRICS}
    pictures["time.png"] = _time_picture(histories)
    if not any(pictures.values()):
        names = ", ".join(str(folder) for folder in options.runs)
        raise ConfigError(f"{names} has no logged metrics yet; try again after the next --train.log-every steps")
    out = options.out or (options.runs[0] if len(options.runs) == 1 else Path())
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            if figure is None:
                print(f"no {name}: no run has logged this metric")
            else:
                figure.savefig(out / name, dpi=150)
                print(printable(f"wrote {out / name}"))
    except OSError as error:
        raise ConfigError(f"the plots cannot be written to {out} ({error.strerror}); change --out") from None
    return 0


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"fastssl plot needs matplotlib, which is not installed: {install_command('plots')}"
        ) from None


def _figure(height: float) -> Figure:
    # Without pyplot, which would keep the figure in a global list; Agg draws it into files
    from matplotlib.figure import Figure

    return Figure(figsize=(_INCHES[0], height), layout="constrained")


def _metric_picture(histories: list[History], metric: Metric) -> Figure | None:
    lines: list[tuple[str, Series]] = [
        (name, series)
        for name, history in zip(_names(histories), histories, strict=True)
        if (series := history.series(metric))
    ]
    if not lines:
        return None
    figure = _figure(_INCHES[1])
    axes = figure.subplots()
    for name, series in lines:
        few = len(series) <= _DOTS_AT_MOST
        axes.plot(list(series), list(series.values()), label=name, linewidth=1.2, marker="o" if few else "", ms=4)
    if metric.from_zero:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="step", ylabel=metric.title)
    axes.xaxis.set_major_formatter(_thousands)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _time_picture(histories: list[History]) -> Figure | None:
    shown = [
        (name, shares)
        for name, history in zip(_names(histories), histories, strict=True)
        if (shares := history.shares())
    ]
    if not shown:
        return None
    figure = _figure(_INCHES[1] * max(1.0, 0.7 * len(shown)))
    parts: dict[Part, Artist] = {}
    for axes, (name, shares) in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown, strict=True):
        steps: list[float] = list(next(iter(shares.values())))
        columns = [[100 * share for share in series.values()] for series in shares.values()]
        if len(steps) == 1:  # A single point has no area
            steps, columns = [steps[0] - 0.5, steps[0] + 0.5], [column * 2 for column in columns]
        areas = axes.stackplot(steps, columns, colors=[part.color for part in shares])
        parts |= dict(zip(shares, areas, strict=True))
        axes.set(title=name, ylabel="share of the time (%)", xlim=(steps[0], steps[-1]), ylim=(0, 100))
        axes.xaxis.set_major_formatter(_thousands)
    axes.set_xlabel("step")
    figure.legend(handles=parts.values(), labels=[part.title for part in parts], loc="outside lower center", ncols=3)
    return figure


def _thousands(step: float, _position: object) -> str:
    return f"{step:,.0f}" if step == round(step) else ""


def _names(histories: list[History]) -> list[str]:
    """The folders' names as labels, or their paths if two folders have the same name."""
    names = [history.name for history in histories]
    names = names if len(set(names)) == len(names) else [str(history.folder) for history in histories]
    return [printable(name).replace("$", r"\$") for name in names]  # Else matplotlib reads a formula
