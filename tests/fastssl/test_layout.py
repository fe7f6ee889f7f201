"""The shape of the repository: who may import whom, what goes into the wheel, and that the tools are content."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "fastssl": ROOT / "fastssl",
    "fastssl_kernels": ROOT / "kernels" / "fastssl_kernels",
    "fastssl_pipelines": ROOT / "pipelines" / "fastssl_pipelines",
}
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
        assert "torchvision" not in roots or path.name in ("torchvision.py", "named.py"), path


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


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_the_command(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in PACKAGES.items():
        for path in [*folder.rglob("*.py"), folder / "py.typed"]:
            assert str(Path(package) / path.relative_to(folder)) in names
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert "fastssl = fastssl.start:command" in zipfile.ZipFile(wheel).read(entry_points).decode()
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    script = "import fastssl; print(fastssl.__file__); from fastssl.cli import main; main(['doctor'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(installed))
    assert "blockwise" in done.stdout


@pytest.mark.parametrize("tool", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join)
def test_the_tools_have_nothing_to_say(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
