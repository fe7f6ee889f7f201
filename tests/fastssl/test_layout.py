"""The shape of the repository: who may import whom, what goes into the wheel, what messages say to install."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from fastssl_pipelines.errors import DISTRIBUTION, install_command

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "fastssl": ROOT / "fastssl",
    "fastssl_kernels": ROOT / "kernels" / "fastssl_kernels",
    "fastssl_pipelines": ROOT / "pipelines" / "fastssl_pipelines",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORBIDDEN = {
    "fastssl": {"bench", "tests"},
    "fastssl_kernels": {"bench", "tests", "fastssl", "fastssl_pipelines", "torchvision", "numpy"},
    "fastssl_pipelines": {"bench", "tests", "fastssl"},
}


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module)
    return modules


# Who stands on whom: a room (a folder or a file) imports from floors before its own, and from itself.
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
        "autograd backend checks numerics sass",
        "augment_parameters rows",
        "reference blockwise triton",
        "augment ops",
        "groups in_batch losses read",
        "aot parity",
    ),
    "fastssl_pipelines": (
        "errors names views",
        "batch files plan",
        "sampler sources",
        "labels synthetic",
        "executors",
    ),
}


def graph(package: str) -> dict[str, set[str]]:
    """By module, without the package's name, the modules of the package that it imports anywhere in its file."""
    folder = PACKAGES[package]
    paths = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {module: set(_imports(package, module, path, paths.keys())) - {module} for module, path in paths.items()}


def _imports(package: str, module: str, path: Path, known: Collection[str]) -> Iterator[str]:
    inside = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [package, *inside[: len(inside) - node.level + 1]] if node.level else []
            whole = ".".join([*filter(None, base), *filter(None, [node.module])])
            names = [f"{whole}.{alias.name}" for alias in node.names]
        for name in names:
            own = name.removeprefix(f"{package}.")
            if name.startswith(f"{package}."):
                yield own if own in known else own.rpartition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_runs_back_up(package):
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS[package]) for room in rooms.split()}
    arrows = {
        (module.split(".")[0], other.split(".")[0])
        for module, others in graph(package).items()
        for other in others
        if module and other
    }
    assert {module.split(".")[0] for module in graph(package) if module} == floor_of.keys()
    assert (
        sorted(f"{room} -> {other}" for room, other in arrows if room != other and floor_of[other] >= floor_of[room])
        == []
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_runs_in_a_circle(package):
    # a package's own file names what it holds, and whoever imports one of these imports that file first
    arrows = {module: {other for other in others if other} for module, others in graph(package).items() if module}
    while ends := {module for module, others in arrows.items() if not others & arrows.keys()}:
        arrows = {module: others for module, others in arrows.items() if module not in ends}
    assert arrows == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert len(files) > 3
    for path in files:
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert not roots & FORBIDDEN[package], path


def test_pipelines_take_only_augment_from_the_kernels():
    for path in PACKAGES["fastssl_pipelines"].rglob("*.py"):
        kernels = {module for module in imported_modules(path) if module.startswith("fastssl_kernels")}
        assert kernels <= {"fastssl_kernels.augment"}, path


def test_dali_and_torchvision_are_imported_only_where_they_are_the_point():
    for path in PACKAGES["fastssl_pipelines"].rglob("*.py"):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert "nvidia" not in roots or path.name in ("dali.py", "dali_graph.py"), path
        assert "torchvision" not in roots or path.name in ("torchvision.py", "torchvision_sets.py"), path


def test_no_file_is_longer_than_500_lines():
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 500, path


def test_every_package_is_listed_for_the_wheel():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {
        ".".join([name, *path.parent.relative_to(folder).parts])
        for name, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    assert listed == present


def test_every_declared_dependency_is_imported():
    imported = {
        module.split(".")[0]
        for folder in PACKAGES.values()
        for path in folder.rglob("*.py")
        for module in imported_modules(path)
    }
    names = {"pillow": "PIL"}  # imported by another name
    declared = [re.match(r"[\w-]+", text).group() for text in PROJECT["dependencies"]]
    assert len(declared) > 3
    assert [name for name in declared if names.get(name, name) not in imported] == []


def test_messages_name_a_distribution_and_extras_that_exist():
    assert PROJECT["name"] == DISTRIBUTION
    extras = set()
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            text = path.read_text()
            extras |= set(re.findall(r"install_command\([\"'](.*?)[\"']\)", text))
            assert "fastssl[" not in text, path
    assert {"dali", "timm", "plots", "tensorboard"} <= extras <= set(PROJECT["optional-dependencies"])
    assert install_command("plots") == f"pip install '{DISTRIBUTION}[plots]'"
