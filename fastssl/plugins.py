"""Plug-ins: installed packages that register methods, encoders, presets or losses of their own.

A package names a module in the entry-point group "fastssl.plugins"; importing the module runs its registering
decorators:

    [project.entry-points."fastssl.plugins"]
    my-plugin = "my_package.fastssl_plugin"

The decorators are `fastssl.methods.register_method`, `fastssl.models.encoders.register_encoder` and
`fastssl.presets.preset`; a loss is registered by a call of `fastssl_kernels.register_loss`. The command line calls
`load` before it reads any option; Python code calls it itself.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from fastssl.errors import ConfigError

GROUP = "fastssl.plugins"


@cache
def load() -> None:
    """Import every installed plug-in once; ConfigError names the one that cannot be imported or shares its name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if point.name in found:
            raise ConfigError(
                f"plug-in {point.name!r} was found in {_package(found[point.name])} and in {_package(point)}; "
                "names must differ: uninstall one of them"
            )
        found[point.name] = point
    for point in found.values():
        _import(point)


def _import(point: EntryPoint) -> None:
    try:
        point.load()
    except ConfigError as error:
        raise ConfigError(f"plug-in {point.name!r} of {_package(point)} cannot be registered: {error}") from error
    # A module that calls sys.exit must not end the command without a word
    except (Exception, SystemExit) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ConfigError(
            f"plug-in {point.name!r} ({point.value}) of {_package(point)} cannot be imported "
            f"({type(error).__name__}: {reason}); repair or uninstall it"
        ) from error


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"
