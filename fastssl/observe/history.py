"""The history of a run, read from its folder for plots and reports; works for running and killed runs too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastssl.errors import ConfigError
from fastssl.observe.metrics_log import LOG_AT_MOST_BYTES, parse_json, valid_records
from fastssl_pipelines.errors import MachineError
from fastssl_pipelines.files import read_file

_WARNING = "warning: "  # The console's prefix


class Metric(NamedTuple):
    """A metric plotted over the steps: name of its picture, event and key of its records, and title of its axis."""

    picture: str
    event: str
    key: str
    title: str
    scale: float = 1.0
    from_zero: bool = False


LOSS = Metric("loss", "train", "loss", "loss")
ACCURACY = Metric("contrast_accuracy", "train", "contrast_accuracy", "contrast accuracy (%)", scale=100)
KNN = Metric("knn", "eval", "knn_top1", "kNN top-1 (%)")
SPEED = Metric("images_per_s", "train", "images_per_s", "images/s", from_zero=True)
METRICS = (LOSS, ACCURACY, KNN, SPEED)


class Part(NamedTuple):
    """A part of a training step: its name in the records, its title and its color in every plot."""

    name: str
    title: str
    color: str


REST = Part("rest", "everything else", "#9aa0a6")
PARTS = (
    Part("data", "waiting for data", "#e69f00"),
    Part("forward", "forward", "#56b4e9"),
    Part("loss", "loss", "#009e73"),
    Part("backward", "backward", "#0072b2"),
    Part("graph", "forward, loss and backward in one CUDA graph", "#0072b2"),
    Part("optimizer", "optimizer, momentum encoder, queue", "#cc79a7"),
    REST,
)

Series = dict[int, float]
"""Values by step, in step order."""


@dataclass(frozen=True)
class History:
    """The readable part of a run folder; damaged and missing data are left out."""

    folder: Path
    records: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]
    warnings: list[str]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def of(self, event: str) -> list[dict[str, Any]]:
        """The records of an event."""
        return [record for record in self.records if record["event"] == event]

    def series(self, metric: Metric) -> Series:
        """The finite values of a metric."""
        found = {record["step"]: finite_number(record.get(metric.key)) for record in self.of(metric.event)}
        return {step: value * metric.scale for step, value in sorted(found.items()) if value is not None}

    def shares(self) -> dict[Part, Series]:
        """Fractions of the wall time of the measured parts; with REST they add up to 1 at each step."""
        found: dict[int, dict[Part, float]] = {}
        for record in self.of("train"):
            given = {part: finite_number(record.get(f"share_{part.name}")) for part in PARTS if part is not REST}
            known = {part: max(0.0, share) for part, share in given.items() if share is not None}
            whole = sum(known.values())
            if whole > 0:
                # Overlapping parts can add up to more than 1
                shares = {part: share / max(whole, 1.0) for part, share in known.items()}
                found[record["step"]] = {**shares, REST: 1 - sum(shares.values())}
        steps = sorted(found)
        measured = [part for part in PARTS if any(found[step].get(part, 0.0) > 1e-3 for step in steps)]
        return {part: {step: found[step].get(part, 0.0) for step in steps} for part in measured}

    def setting(self, path: str) -> Any:
        """A value of config.json by its dotted name ("train.batch_size"); None if it is missing."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_history(folder: Path) -> History:
    """Read the history of a run; ConfigError for a folder without metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise ConfigError(
            f"{folder} has no metrics.jsonl, so it is not a run folder; give the folder that `fastssl pretrain` printed"
        )
    console_lines = _text(folder / "console.log").splitlines()
    return History(
        folder,
        valid_records(_text(path).splitlines()),
        config=_object(folder / "config.json"),
        environment=_object(folder / "env.json"),
        warnings=[line.removeprefix(_WARNING) for line in console_lines if line.startswith(_WARNING)],
    )


def finite_number(value: Any) -> float | None:
    """`value` as a float if it is a number of sensible size, else None."""
    # The bounds keep products and quotients of a few values finite, and exclude NaN
    sensible = isinstance(value, int | float) and not isinstance(value, bool) and -1e60 < value < 1e60
    return (float(value) if abs(value) > 1e-60 else 0.0) if sensible else None


def _object(path: Path) -> dict[str, Any]:
    value = parse_json(_text(path))
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    try:
        return read_file(path, at_most_bytes=LOG_AT_MOST_BYTES).decode("utf-8", "replace")
    except (OSError, MachineError):
        return ""
