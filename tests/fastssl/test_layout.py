"""The shape of the repository: who may import whom, file names and lengths, the wheel's packages, install hints."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastssl_pipelines.errors import DISTRIBUTION, install_command

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = {name: ROOT / folder for name, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}
OUTSIDE_TESTS = ("bench", "fastssl", "kernels", "pipelines", ".ci")
FORBIDDEN = {
    "fastssl": {"bench", "tests"},
    "fastssl_kernels": {"bench", "tests", "fastssl", "fastssl_pipelines", "torchvision", "numpy"},
    "fastssl_pipelines": {"bench", "tests", "fastssl"},
}
# `base` holds a folder's base class; `augment` and `losses` are the same functions in every backend
REPEATED_NAMES = {"__init__", "__main__", "base", "errors", "augment", "losses"}
MOST_LINES = 400

# From the foundation up: a file or folder imports only from the lines above its own, and from itself.
FLOORS = {
    "fastssl": (
        "errors renamed",
        "apex distributed plugins registration validation",
        "plain_arguments",
        "arguments models",
        "methods",
        "config",
        "device schedule",
        "environment presets",
        "observe run_folder",
        "data executor",
        "evaluate",
        "train",
        "benchmark",
        "commands",
        "cli",
        "start",
        "__main__",
    ),
    "fastssl_kernels": (
        "autograd backend contract loss_registry sass",
        "augment_parameters rows",
        "reference blockwise triton",
        "augment_images ops",
        "losses",
        "groups",
        "registered_losses",
        "aot parity",
    ),
    "fastssl_pipelines": (
        "errors views",
        "batch files plan",
        "names sampler",
        "sources",
        "labels synthetic",
        "executors",
    ),
}


def modules(package: str) -> dict[str, Path]:
    """The files of a package by dotted name, which starts with the package's."""
    found = {}
    for path in PACKAGES[package].rglob("*.py"):
        parts = (package, *path.relative_to(PACKAGES[package]).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(module: str, path: Path) -> Iterator[str]:
    """Everything that a file imports anywhere, as absolute dotted names; `from a import b` is a.b."""
    folder = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            origin = [*start, *([node.module] if node.module else [])]
            yield from (".".join([*origin, alias.name]) for alias in node.names)


def imported_packages(module: str, path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(module, path)}


def graph(package: str) -> dict[str, set[str]]:
    """For each module of a package, without the package's name, the modules of the package that it imports."""
    known = modules(package)
    arrows: dict[str, set[str]] = {}
    for module, path in known.items():
        own = [name for name in imported_names(module, path) if name.startswith(f"{package}.")]
        targets = {name if name in known else name.rpartition(".")[0] for name in own} - {module}
        arrows[_inside(package, module)] = {_inside(package, target) for target in targets}
    return arrows


def _inside(package: str, module: str) -> str:
    return module.removeprefix(package).removeprefix(".")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package):
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS[package]) for room in rooms.split()}
    arrows = {
        (module.split(".")[0], other.split(".")[0])
        for module, others in graph(package).items()
        for other in others
        if module and other
    }
    assert {module.split(".")[0] for module in graph(package) if module} == floor_of.keys()
    upward = [(room, other) for room, other in arrows if room != other and floor_of[other] >= floor_of[room]]
    assert sorted(upward) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_have_no_cycle(package):
    # A package's __init__ imports its modules, and runs before any of them
    arrows = {module: {other for other in others if other} for module, others in graph(package).items() if module}
    while ends := {module for module, others in arrows.items() if not others & arrows.keys()}:
        arrows = {module: others for module, others in arrows.items() if module not in ends}
    assert arrows == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_do_not_import_those_above_them(package):
    files = modules(package)
    assert len(files) > 3
    for module, path in files.items():
        assert not imported_packages(module, path) & FORBIDDEN[package], path


def test_pipelines_import_only_the_augmentation_from_kernels():
    for module, path in modules("fastssl_pipelines").items():
        names = [name.split(".") for name in imported_names(module, path)]
        kernels = {name[1] for name in names if name[0] == "fastssl_kernels"}
        assert kernels <= {"augment", "AugmentParameters"}, path


def test_only_their_executors_and_sources_import_dali_and_torchvision():
    for module, path in modules("fastssl_pipelines").items():
        packages = imported_packages(module, path)
        assert "nvidia" not in packages or path.name in ("dali.py", "dali_graph.py"), path
        assert "torchvision" not in packages or path.name in ("torchvision.py", "torchvision_sets.py"), path


def test_a_file_name_means_one_thing():
    paths = [path for folder in OUTSIDE_TESTS for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 150
    counts = Counter(path.stem for path in paths)
    assert [name for name, count in counts.items() if count > 1 and name not in REPEATED_NAMES] == []


def test_no_file_is_longer_than_400_lines():
    paths = [path for folder in (*OUTSIDE_TESTS, "tests") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert {path: lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_package_is_listed_for_the_wheel():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    present = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    assert listed == present


def test_every_declared_dependency_is_imported():
    imported = set().union(*(imported_packages(*file) for package in PACKAGES for file in modules(package).items()))
    import_names = {"pillow": "PIL"}
    declared = [re.match(r"[\w-]+", text).group() for text in PROJECT["dependencies"]]
    assert len(declared) > 3
    assert [name for name in declared if import_names.get(name, name) not in imported] == []


def test_install_hints_name_the_distribution_and_its_extras():
    assert PROJECT["name"] == DISTRIBUTION
    extras = set()
    for package in PACKAGES:
        for path in modules(package).values():
            text = path.read_text()
            extras |= set(re.findall(r"install_command\([\"'](.*?)[\"']\)", text))
            assert "fastssl[" not in text, path
    assert {"dali", "timm", "plots", "tensorboard"} <= extras <= set(PROJECT["optional-dependencies"])
    assert install_command("plots") == f"pip install '{DISTRIBUTION}[plots]'"
