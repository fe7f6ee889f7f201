"""`fastssl data check`: read and decode every file of a data set before a long run does."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastssl.arguments import Positional, parse
from fastssl.data import split_roots
from fastssl.errors import ConfigError, unknown_name
from fastssl.observe.screen import DelayedProgressBar
from fastssl.validation import Checked, Threads
from fastssl_pipelines.names import printable, write_names
from fastssl_pipelines.sources.inspection import DefectKind, Finding, inspect_all
from fastssl_pipelines.sources.open import list_images

EXIT_FOUND = 1
SHOWN = 5  # Names listed for each kind


@dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Reads and decodes every image; exit code 1 if some are unusable or have contradictory labels."""

    root: Annotated[Path, Positional]
    """--data.root of the run; both training and test images are checked"""
    quarantine: Path | None = None
    """file for the names of these images, one per line, for --data.quarantine of fastssl pretrain"""
    workers: Threads = os.cpu_count() or 1
    """threads that read and decode"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quarantine is not None:
            _require_new(self.quarantine)


def main(arguments: list[str]) -> int:
    """`fastssl data check DIR [--quarantine LIST] [--workers N]`."""
    task, *rest = arguments or [""]
    if task != "check":
        raise unknown_name("task for data", task, ["check"])
    return run(parse(Options, rest, prog="fastssl data check"))


def run(options: Options) -> int:
    """Print the findings; return 0, or EXIT_FOUND if some images are unusable or have contradictory labels.

    Names in the quarantine list are those of `Source.name_of`, relative to the split's folder, so a name in both
    splits is left out of both.
    """
    roots = [root for root in split_roots(options.root) if root]
    listings = [list_images(root) for root in roots]
    total = sum(map(len, listings))
    started = time.perf_counter()
    with DelayedProgressBar() as progress:
        findings = inspect_all(listings, workers=options.workers, progress=progress)
    rate = total / (time.perf_counter() - started)
    prefixes = [f"{root.name}: " if len(roots) > 1 else "" for root in roots]
    for line in _summary(findings, prefixes):
        print(printable(line))
    for prefix, listing in zip(prefixes, listings, strict=True):
        if ignored := listing.describe_ignored():
            print(printable(f"{prefix}{ignored}"))
    # An image has at most one such defect
    bad = [finding.name for finding in findings if not finding.defect.kind.harmless]
    print(f"{total} images read at {rate:.0f} images/s, {len(bad) or 'none'} of them unusable or contradictory")
    if options.quarantine is not None:
        names = list(dict.fromkeys(bad))
        _write(options.quarantine, names)
        print(printable(f"{len(names)} names are in {options.quarantine}, for --data.quarantine of fastssl pretrain"))
    elif bad:
        print("to train without them: --quarantine LIST here, then --data.quarantine LIST of fastssl pretrain")
    return EXIT_FOUND if bad else 0


def _summary(findings: list[Finding], prefixes: list[str]) -> Iterator[str]:
    """One line for each kind that was found, followed by its first names."""
    width = max(len(kind.title) for kind in DefectKind)
    if findings:
        yield f"{'found':<{width}}  images  in training"
    for kind in DefectKind:
        images = [finding for finding in findings if finding.defect.kind is kind]
        if not images:
            continue
        yield f"{kind.title:<{width}}  {len(images):>6}  {kind.consequence}"
        for finding in images[:SHOWN]:
            detail = f" ({finding.defect.detail})" if finding.defect.detail else ""
            yield f"    {prefixes[finding.listing]}{finding.name}{detail}"
        if len(images) > SHOWN:
            yield f"    and {len(images) - SHOWN} more"


def _require_new(path: Path) -> None:
    """Raise ConfigError before hours of reading if the list cannot be written."""
    if os.path.lexists(path) and not (os.path.isfile(path) and os.path.getsize(path) == 0):
        raise ConfigError(f"--quarantine {path} already exists; remove it or give the name of a new file")
    if not os.path.isdir(path.parent) or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--quarantine {path} was given; {path.parent} must be a folder that can be written to")


def _write(path: Path, names: list[str]) -> None:
    try:
        write_names(path, names)
    except OSError as error:
        raise ConfigError(
            f"--quarantine {path} could not be written ({error.strerror}); give a file on a disk with room"
        ) from None
