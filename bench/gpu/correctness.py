"""Parts that check: the machine, the GPU tests, losses against their definitions, and an overflow in fp16."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import torch

from bench import run_record
from fastssl import cli
from fastssl.benchmark.step_variants import NO_END, as_training, synthetic_batches
from fastssl.commands import doctor
from fastssl.commands.verify import DTYPES
from fastssl.config import OptimConfig
from fastssl.methods import TrainProgress
from fastssl.presets import load
from fastssl.train.build import build_method, build_step

from .part_context import Failed, PartContext, Skipped

ROOT = Path(__file__).parents[2]
GPU_FACTS = (
    *("name", "driver_version", "memory.total", "memory.used", "utilization.gpu", "temperature.gpu", "power.draw"),
    *("power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "mig.mode.current"),
)
MOST_STEPS = 20  # In fp16 until a weight changes
HELPFUL = ("tyro", "rich", "nvidia.dali", "lightly", "pytest", "xdist", "hypothesis", "timm", "matplotlib")


def environment(context: PartContext) -> None:
    """Record what all results depend on."""
    context.once("facts", lambda: run_record.environment(["python -m bench gpu"], context.device))
    context.once("cores", os.cpu_count)
    context.once("memory GiB", lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    context.once("packages", lambda: {name: _is_there(name) for name in HELPFUL})
    if not context.rehearsal:
        context.once("gpu", _gpu)
    context.once("doctor", lambda: {title: dict(rows) for title, rows in doctor.report()})


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # The package that would contain it
        return False


def _gpu() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(zip(GPU_FACTS, run.stdout.splitlines()[0].split(", "), strict=True))


def tests(context: PartContext) -> None:
    """Run the tests marked gpu; on a CPU they are collected and skipped."""
    if not _is_there("pytest"):
        raise Skipped("pytest is not installed")
    context.once("tests", lambda: _tests(context))


def _tests(context: PartContext) -> dict[str, Any]:
    # Other files are left out, as a failing import there would end the run
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    results = context.folder / "tests.xml"
    options = ["-m", "gpu", "-q", "-o", "addopts=--strict-markers --import-mode=importlib", f"--junitxml={results}"]
    options += ["-p", "bench.gpu.pytest_failures"]
    processes = ["-n", "8"] if _is_there("xdist") and not context.rehearsal else []
    subprocess.run([sys.executable, "-m", "pytest", *options, *processes, *map(str, files)], cwd=ROOT, check=False)
    suite = next(ElementTree.parse(results).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = [f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase") if _is_bad(case)]
    if bad or not counts["tests"]:
        context.numbers["counts"], context.numbers["failed"] = counts, bad
        raise Failed(f"{len(bad)} of {counts['tests']} failed, the first of them {bad[0] if bad else 'none'}")
    return counts


def _is_bad(case: ElementTree.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def verify(context: PartContext) -> None:
    """Run `fastssl verify` one dtype at a time; on a CPU for one loss."""
    for name in reversed(DTYPES):  # The dtypes of training first
        context.once(name, partial(_verified, context, name))


def _verified(context: PartContext, dtype: str) -> str:
    loss = "info_nce" if context.rehearsal else "all"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = cli.main(["verify", loss, "--device", context.device.type, "--dtype", dtype])
    print(shown.getvalue())
    lines = [line.strip() for line in shown.getvalue().splitlines() if line.strip()]
    if code:
        failed = [" ".join(line.split()[:3]) for line in lines if line.endswith("FAIL")]
        raise Failed(f"{lines[-1] if lines else f'exit code {code}'}: {'; '.join(failed)}")
    return lines[-1]


def fp16(context: PartContext) -> None:
    """Check that an overflow at the first step keeps momentum and weights and halves the scale."""
    for optimizer in ("sgd", "lars"):
        context.once(optimizer, partial(_overflow, context.device, optimizer))


def _overflow(device: torch.device, optimizer: Literal["sgd", "lars"]) -> dict[str, float]:
    preset = load("quickstart")
    # Few images, as convolutions in fp16 are slow on a CPU
    train = replace(preset.train, batch_size=8, precision="fp16", compile="off")
    config = replace(preset, optim=OptimConfig(optimizer=optimizer, lr=0.03, momentum=0.9), train=train)
    method = build_method(config, device)
    step = build_step(config, method, device=device, dtype=torch.float16)
    batch = as_training(synthetic_batches(config, device)[0], torch.float16, torch.channels_last)
    weights = [p for p in method.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]

    def largest_change() -> float:
        return max((p - old).abs().max().item() for p, old in zip(weights, before, strict=True))

    scale = step.scaler.get_scale()
    overflow = weights[0].register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    step(batch, TrainProgress(0, NO_END, NO_END), config.optim.lr)
    overflow.remove()
    halved = step.scaler.get_scale()
    if halved != scale / 2:
        raise Failed(f"the scale went from {scale:g} to {halved:g}; an overflow must halve it")
    if largest_change() != 0:
        raise Failed("the step with the overflow changed weights")
    states = step.optimizer.state.values()
    momenta = [state["momentum_buffer"] for state in states if state.get("momentum_buffer") is not None]
    if not all(bool(torch.all(momentum == 0)) for momentum in momenta):
        raise Failed("the step with the overflow left a momentum other than 0, which the next step would apply")

    steps = 1
    while largest_change() == 0 and steps < MOST_STEPS:  # The scale may have to fall further
        output = step(batch, TrainProgress(steps, NO_END, NO_END), config.optim.lr)
        steps += 1
    moved = largest_change()
    if not 0 < moved < 10 or not output.loss.isfinite():
        raise Failed(f"after {steps} steps the largest change of a weight is {moved:g} and the loss {output.loss:g}")
    return {"scale before": scale, "after": halved, "steps": steps, "furthest move of a weight": moved}
