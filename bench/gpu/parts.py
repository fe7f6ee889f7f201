"""The parts of the proof, most valuable first, and how much of the time each may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastssl.errors import unknown_name

PASSED, FAILED, TIMEOUT, SKIPPED = "passed", "failed", "timeout", "skipped"


class Part(NamedTuple):
    """One part: a function of this package that runs in its own process."""

    name: str
    title: str
    function: str
    """As module.function."""
    share: float
    """Weight in the division of the time: about the seconds that it takes on a GPU."""


PARTS = (
    Part("environment", "device, clocks, versions, `fastssl doctor`", "correctness.environment", 25),
    Part("tests", "tests that need a GPU", "correctness.tests", 110),
    Part("verify", "`fastssl verify` in all dtypes", "correctness.verify", 60),
    Part("fp16", "an overflow at the first step in fp16", "correctness.fp16", 30),
    Part("resume", "quickstart, kill -9 and bit-equal resume", "training_runs.resume", 60),
    Part("captures", "20 captures next to a prefetching input", "captures.captures", 45),
    Part("losses", "loss and gradient next to every peer", "speed.losses", 80),
    Part("step", "training step of a ResNet-50 next to the supervised one", "speed.step", 80),
    Part("small", "ResNet-18 at 32 px next to lightly's loop", "small_images.small", 60),
    Part("input", "images/s of the input pipelines", "speed.inputs", 40),
    Part("collectives", "collectives of one rank", "collectives.collectives", 25),
    Part("learning", "a short run on photographs", "training_runs.learning", 50),
)


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts with these names, or all; ConfigError for an unknown name."""
    known = {part.name: part for part in PARTS}
    for name in names:
        if name not in known:
            raise unknown_name("part", name, known)
    return [part for part in PARTS if part.name in names or not names]


def left_to_do(parts: Sequence[Part], records: Mapping[str, Mapping[str, Any]], device: str) -> list[Part]:
    """The parts that are not done on this device: first those never tried, then those that failed or timed out."""

    def status(part: Part) -> str | None:
        record = records.get(part.name)
        return record["status"] if record and record["device"] == device else None

    new = [part for part in parts if status(part) is None]
    return new + [part for part in parts if status(part) in (FAILED, TIMEOUT)]


def seconds_for(part: Part, later: Sequence[Part], left_s: float) -> float:
    """The time-out of a part: its share of the time left, so that unused time goes to later parts."""
    return left_s * part.share / (part.share + sum(other.share for other in later))
