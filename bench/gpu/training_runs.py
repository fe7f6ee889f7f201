"""Parts that run `fastssl pretrain`: a run that is killed and resumed, and one that learns."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastssl.observe.metrics_log import MetricsLog
from fastssl.train import checkpoint

from .correctness import ROOT
from .part_context import Failed, PartContext, Skipped

GIVEN = (Path("shared/data"), Path("../shared/data"))  # Relative to the root of the project
ARCHIVE = "cifar10-imagefolder.tar.xz"
POLL_S = 0.005
SHIPPED = ("--train.steps", 200, "--eval.every-epochs", 100)


def resume(context: PartContext) -> None:
    """Check that a run that was killed and resumed ends with the weights of an undisturbed one, bit for bit."""
    context.once("resume", lambda: _resume(context))


def _resume(context: PartContext) -> dict[str, Any]:
    steps, every = (12, 4) if context.rehearsal else (400, 50)
    whole, killed = context.folder / "whole", context.folder / "killed"
    options = ["--train.steps", steps, "--train.checkpoint-every", every, "--train.deterministic"]
    options += ["--train.device", context.device.type, "--train.compile", "off", "--train.log-every", every]
    if context.rehearsal:
        options += ["--train.batch-size", 16, "--data.pictures", 300]
    _fastssl("pretrain", *options, "--run.dir", whole)
    killed_at = _killed(killed, options)
    _fastssl("resume", killed)
    first, second = (_final(folder, steps) for folder in (whole, killed))
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    if different:
        raise Failed(f"{len(different)} of {len(first)} tensors differ after the resume, among them {different[0]}")
    return {"steps": steps, "killed after the checkpoint of step": killed_at, "equal tensors": len(first)}


def _killed(folder: Path, options: list[Any]) -> int:
    """Start a run, kill it as soon as it has a checkpoint after step 0, and return the step of that."""
    process = subprocess.Popen(_command("pretrain", *options, "--run.dir", folder), cwd=ROOT)
    try:
        while process.poll() is None:
            paths = checkpoint.checkpoints(folder / "checkpoints") if (folder / "checkpoints").is_dir() else []
            if paths and (step := checkpoint.load(paths[-1])["step"]):
                return step
            time.sleep(POLL_S)
        raise Failed(f"the run ended with exit code {process.returncode} before it could be killed")
    finally:
        process.kill()
        if process.wait() == 0:
            raise Failed("the run ended before the kill reached it")


def _final(folder: Path, step: int) -> dict[str, torch.Tensor]:
    state = checkpoint.load(checkpoint.path_of(folder / "checkpoints", step))
    tensors = dict(state["method"])
    for index, values in state["optimizer"]["state"].items():
        tensors |= {f"{name} of parameter {index}": value for name, value in values.items()}
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def learning(context: PartContext) -> None:
    """Measure kNN before and after a short run on photographs; on a CPU on a few procedural pictures."""
    if context.rehearsal:
        context.once(
            "run",
            lambda: _learned(
                context, "quickstart", ["--train.steps", 20, "--train.batch-size", 64, "--data.pictures", 600]
            ),
        )
        return
    root = photographs(context)
    short = ["--data.root", root, "--train.epochs", 4, "--train.batch-size", 256, "--optim.warmup-epochs", 1]
    # Without batch norm in the head a short run stays collapsed, as it starts
    short += ["--optim.lr", 0.2, "--method.head", "mlp-bn", "--method.hidden-dim", "None", "--method.queue-size", 4096]
    graph = ["--train.compile", "off", "--train.cuda-graph"]  # Compiling would take longer than the run
    context.once("run", lambda: _learned(context, "mocov2-cifar10", [*short, *graph]))
    run = context.numbers.get("run")
    if run and run["kNN %"] <= run["kNN untrained %"]:
        context.errors["kNN"] = (
            f"it went from {run['kNN untrained %']:.2f} to {run['kNN %']:.2f} %; training must raise it"
        )
        context.write()
    context.once("200 steps as shipped", lambda: _learned(context, "mocov2-cifar10", ["--data.root", root, *SHIPPED]))


def _learned(context: PartContext, preset: str, options: list[Any]) -> dict[str, Any]:
    folder = context.folder / f"run-{len(context.numbers)}"
    _fastssl("pretrain", preset, *options, "--train.device", context.device.type, "--run.dir", folder)
    records = MetricsLog(folder / "metrics.jsonl").read()
    end, lines = records[-1], [record for record in records if record["event"] == "train"]
    return {
        "kNN untrained %": end["untrained_top1"],
        "kNN %": end["knn_top1"],
        "images/s": median(line["images_per_s"] for line in lines),
        "steps": end["step"],
    }


def photographs(context: PartContext) -> Path:
    """The folder of photographs, unpacked if it is an archive; Skipped if there is none."""
    places = [context.data] if context.data else [ROOT / place for place in GIVEN]
    for place in places:
        archive = place if place.is_file() else place / ARCHIVE
        if archive.is_file():
            root = context.folder / "photographs"
            with tarfile.open(archive) as file:
                file.extractall(root, filter="data")
            return root
        if any(place.glob("train*")):
            return place
    raise Skipped(f"no photographs in {' or '.join(map(str, places))}; give a folder or a .tar file with --data")


def _command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "fastssl", *map(str, words)]


def _fastssl(*words: Any) -> None:
    code = subprocess.run(_command(*words), cwd=ROOT, check=False).returncode
    if code:
        raise Failed(f"fastssl {' '.join(map(str, words))} ended with exit code {code}")
