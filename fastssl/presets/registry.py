"""How presets are registered and found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastssl.config import Config
from fastssl.errors import unknown_name


@dataclass(frozen=True)
class Preset:
    """A recipe: `source` says whose, `published` what it reached, `differs` what we do otherwise.

    `published` names metric, number, epochs and whose table; it is for a ResNet of the size that the preset trains.
    UNVERIFIED in `differs` marks a value whose source could not be read.
    """

    build: Callable[[], Config]
    data: str
    source: str
    published: str
    differs: str


PRESETS: dict[str, Preset] = {}


def preset(name: str, *, data: str, source: str, published: str, differs: str):
    """Register a function under `name`, <method>-<data>."""

    def register(build: Callable[[], Config]) -> Callable[[], Config]:
        PRESETS[name] = Preset(lambda: replace(build(), preset=name), data, source, published, differs)
        return build

    return register


def load(name: str) -> Config:
    """The configuration of a preset; raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name].build()
