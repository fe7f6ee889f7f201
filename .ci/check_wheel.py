"""Check that a wheel holds every module, the data files and the command, and works without the source tree."""

import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
SCRIPT = "import fastssl; print(fastssl.__file__); from fastssl.cli import main; main(['doctor']); main(['slurm'])"


def main(wheel: str) -> None:
    """Raise AssertionError for the first thing that is missing."""
    with tempfile.TemporaryDirectory() as installed, zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for package, name in FOLDERS.items():
            folder = ROOT / name
            for path in [*folder.rglob("*.py"), *folder.rglob("*.sbatch"), folder / "py.typed"]:
                assert str(Path(package) / path.relative_to(folder)) in names, path
        archive.extractall(installed)
        (entry_points,) = Path(installed).glob("*.dist-info/entry_points.txt")
        assert "fastssl = fastssl.start:command" in entry_points.read_text()
        assert list(Path(installed).glob("*.dist-info/licenses/LICENSE"))
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=installed,
            env={**os.environ, "PYTHONPATH": installed},
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.startswith(installed), done.stdout
        assert "blockwise" in done.stdout
        assert "scontrol requeue" in done.stdout
    print(f"{Path(wheel).name} is complete")


if __name__ == "__main__":
    main(sys.argv[1])
