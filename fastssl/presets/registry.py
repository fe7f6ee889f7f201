"""How presets are registered and found, in this package and in plug-ins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastssl.config import Config
from fastssl.registration import Registry


@dataclass(frozen=True)
class Preset:
    """A recipe: `source` is its origin, `published` the result it reached, `differs` how this package deviates from it.

    `published` names metric, value, epochs and table, for a ResNet of the size that the preset trains. UNVERIFIED in
    `differs` marks a value whose source could not be read.
    """

    build: Callable[[], Config]
    data: str
    source: str
    published: str
    differs: str


PRESETS: Registry[Preset] = Registry("preset")


def preset(
    name: str, *, data: str, source: str, published: str, differs: str
) -> Callable[[Callable[[], Config]], Callable[[], Config]]:
    """Decorator: register a function that builds a `Config` under `name`, usually <method>-<data>.

    The other arguments are shown by `fastssl presets`, see `Preset`. ConfigError if that name is taken.
    """

    def register(build: Callable[[], Config]) -> Callable[[], Config]:
        named = Preset(lambda: replace(build(), preset=name), data, source, published, differs)
        PRESETS.register(name, named, build)
        return build

    return register


def load(name: str) -> Config:
    """The configuration of a preset; ConfigError for an unknown name."""
    return PRESETS.find(name).build()
