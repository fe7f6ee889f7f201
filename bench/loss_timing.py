"""`python -m bench losses`: loss and gradient of a query against a queue, compared with the alternatives."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastssl.arguments import parse
from fastssl.benchmark.harness import peak_bytes
from fastssl.errors import ConfigError, unknown_name
from fastssl_kernels import LOSSES, parity

from . import run_record
from .measure import Step, Times, captured, clones_beyond_cache, matmul_rate, time_cpu, time_cuda
from .peers import BOTH, COLUMNS, Case, Column, Unavailable, backend

OURS = "fastssl"
Mode = tuple[str, str]  # Launch, cache


@dataclass(frozen=True)
class Options:
    """Time, accuracy and memory of loss and gradient, all columns interleaved in one process."""

    shapes: tuple[str, ...] = ("256x65536x128",)
    """N x K x C: rows, queue entries, features."""
    loss: str = "info_nce"
    """A registered loss, or all: info_nce and unicon, which have peers."""
    temperature: float = 0.2
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of autocast and, on a GPU, of the queue; on a CPU the queue is float32."""
    device: str = "auto"
    columns: tuple[str, ...] = tuple(COLUMNS)
    """fastssl is always included: ratios are relative to its time."""
    repeats: int | None = None
    """Timed steps per column; default 100 on a GPU, 20 on a CPU."""
    out: Path = Path("bench/results")
    """The folder for the JSON file."""


class Prepared(NamedTuple):
    """A column that runs here: its step, the errors of the result and the memory it allocates."""

    step: Step
    loss_error: float | None
    gradient_error: float | None
    memory_bytes: int


def main(arguments: Sequence[str]) -> Path:
    """Run the benchmark, print the tables and write the JSON; return its path."""
    options = parse(Options, arguments, prog="python -m bench losses")
    columns = _columns(options.columns)
    shapes = [_shape(text) for text in options.shapes]
    if not shapes:
        raise ConfigError("--shapes was given nothing; a shape is N x K x C as in 256x65536x128")
    device, repeats = _device(options.device), options.repeats
    if repeats is not None and repeats < 2:
        raise ConfigError(f"--repeats was given {repeats}; a spread needs 2 or more")
    dtype = getattr(torch, options.dtype)
    rate = matmul_rate(dtype, device) if device.type == "cuda" else None
    facts = run_record.environment(["python", "-m", "bench", "losses", *arguments], device)
    losses = _losses(options.loss)
    if rate is not None:
        facts["matmul_tflops"] = rate / 1e12
    rows: list[run_record.Row] = []
    for shape in shapes:
        for loss in losses:
            inputs = parity.make_inputs(*shape).to(
                torch.float32, dtype if device.type == "cuda" else torch.float32, device
            )
            measured = measure(Case(loss, inputs, options.temperature, dtype), columns, repeats)
            if rate is not None:
                measured = [_with_rate(row, rate) for row in measured]
            run_record.show(measured)
            rows += measured
            # After each shape, so that a later failure loses nothing
            path = run_record.write(options.out, "losses", facts, rows)
    print(f"written: {path}")
    return path


def _losses(name: str) -> tuple[str, ...]:
    timed = [loss for loss, entry in LOSSES.items() if entry.timed and loss != "queue_read"]
    if name not in (*timed, "all"):
        raise unknown_name("loss", name, [*timed, "all"])
    return BOTH if name == "all" else (name,)


def _columns(names: Sequence[str]) -> dict[str, Column]:
    for name in names:
        if name not in COLUMNS:
            raise unknown_name("column", name, COLUMNS)
    return {name: column for name, column in COLUMNS.items() if name in names or name == OURS}


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(f"--shapes was given {text!r}; a shape is N x K x C as in 256x65536x128")
    rows, entries, features = map(int, sizes)
    return rows, entries, features


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device was given {name!r}; it is auto, cpu or cuda (CUDA_VISIBLE_DEVICES picks the GPU)")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device was given cuda, but torch finds no CUDA device; give cpu")
    return torch.device(name)


def measure(case: Case, columns: dict[str, Column], repeats: int | None) -> list[run_record.Row]:
    """A row per column and mode of launch and cache; a column that cannot run has the reason in its note."""
    # Recompile for each shape: dynamo silently falls back to eager after a few of them
    torch._dynamo.reset()
    truth = exact(case)
    prepared: dict[str, Prepared] = {}
    reasons: dict[str, str] = {}
    for name, column in columns.items():
        print(f"{case.loss}: preparing {name}", file=sys.stderr)
        try:
            prepared[name] = _prepare(case, column, truth)
        except Exception as error:  # Whatever a peer raises is the reason to show
            if name.startswith(OURS) and not isinstance(error, Unavailable):
                raise
            reasons[name] = _reason(error)
    if case.device.type == "cuda":
        times, refusals = _cuda_times(case, {name: columns[name] for name in prepared}, repeats or 100)
        reasons |= refusals
    else:
        steps = {name: column.step for name, column in prepared.items()}
        times = {("plain", "interleaved"): time_cpu(steps, repeats or 20, warm_ups=2)}
    return [
        _row(case, name, mode, taken.get(name), taken[OURS], prepared.get(name), note)
        for mode, taken in times.items()
        for name, column in columns.items()
        for note in [column.note if name in taken else reasons[name]]
    ]


def _prepare(case: Case, column: Column, truth: tuple[Tensor, Tensor]) -> Prepared:
    if column.losses is not None and case.loss not in column.losses:
        raise Unavailable(f"has no {case.loss}")
    step = column.build(case)
    result = step()
    loss_error, gradient_error = _errors(case, column, result, truth) if result is not None else (None, None)
    # Of the second step: the first may compile
    return Prepared(step, loss_error, gradient_error, peak_bytes(step, case.device))


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """The mean loss and its gradient by definition, in float64, on the rounded inputs."""
    given = case.inputs.to(torch.float64, torch.float64, case.device)
    rows, entries = len(given.query), len(given.queue)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    # Rows of these two are independent; those of another loss may not be
    size = max(1, 2**24 // entries) if case.loss in BOTH else rows
    for part in torch.arange(rows, device=case.device).split(size):
        query, labels = given.query[part].requires_grad_(), given.query_labels[part]
        of_part = replace(given, key=given.key[part], query_labels=labels) if case.loss in BOTH else given
        (loss,) = LOSSES[case.loss].define(replace(of_part, query=query), case.temperature)
        losses.append(loss.detach())
        gradients += torch.autograd.grad(loss.sum(), query)
    loss = torch.cat(losses)
    return loss.mean(), torch.cat(gradients) / len(loss)


def _errors(
    case: Case, column: Column, result: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    loss, gradient = (x.double() for x in result)
    expected = truth[1]
    if column.normalizes:
        query = case.inputs.query.double()
        expected = expected - (expected * query).sum(1, keepdim=True) * query
    return (
        ((loss - truth[0]).abs() / truth[0].abs()).item(),
        ((gradient - expected).norm() / expected.norm()).item(),
    )


def _reason(error: Exception) -> str:
    """One line; with the type unless the message is meant for the user."""
    message = next(iter(str(error).splitlines()), "")
    return message if isinstance(error, Unavailable) else f"{type(error).__name__}: {message}"[:200]


def _cuda_times(
    case: Case, columns: dict[str, Column], repeats: int
) -> tuple[dict[Mode, dict[str, Times]], dict[str, str]]:
    """Times of plain launches and graph replays, with the queue in L2 or not; and why a column has no graph."""
    times: dict[Mode, dict[str, Times]] = {}
    refusals: dict[str, str] = {}
    for cache, clones in (("warm", 1), ("cold", clones_beyond_cache(case.inputs.queue))):
        warm_ups = max(20, clones)
        steps = {name: [column.build(_cloned(case)) for _ in range(clones)] for name, column in columns.items()}
        times["plain", cache] = time_cuda(steps, repeats, warm_ups, wait=True)
        graphs: dict[str, list[Step]] = {}
        pool = torch.cuda.graph_pool_handle()
        for name, column in columns.items():
            try:
                graphs[name] = _graphs(column, steps[name], pool)
            except Exception as error:  # As in `measure`
                if name.startswith(OURS):
                    raise
                refusals[name] = _reason(error)
        times["graph", cache] = time_cuda(graphs, repeats, warm_ups, wait=False)
    return times, refusals


def _graphs(column: Column, steps: Sequence[Step], pool: Any) -> list[Step]:
    if not column.capturable:
        raise Unavailable("waits for the device, so it cannot be captured in a CUDA graph")
    return [captured(step, pool) for step in steps]


def _cloned(case: Case) -> Case:
    return replace(case, inputs=replace(case.inputs, queue=case.inputs.queue.clone()))


def _row(
    case: Case, name: str, mode: Mode, taken: Times | None, ours: Times, prepared: Prepared | None, note: str
) -> run_record.Row:
    if name.startswith(OURS):
        note = ", ".join(filter(None, [note, f"backend {backend(case)}"]))
    return run_record.Row(
        shape="x".join(map(str, (len(case.inputs.query), *case.inputs.queue.shape))),
        loss=case.loss,
        column=name,
        launch=mode[0],
        cache=mode[1],
        median_ms=taken and taken.median,
        p20_ms=taken and taken.p20,
        p80_ms=taken and taken.p80,
        loss_error=prepared and prepared.loss_error,
        gradient_error=prepared and prepared.gradient_error,
        memory_bytes=prepared and prepared.memory_bytes,
        ratio_to_ours=taken and taken.median / ours.median,
        note=note,
    )


def _with_rate(row: run_record.Row, rate: float) -> run_record.Row:
    """Add to our note the fraction of the matrix product's rate, if there are enough rows to reach it."""
    rows, entries, features = _shape(row.shape)
    if not row.column.startswith(OURS) or rows < 1024 or row.median_ms is None:
        return row
    share = 4 * rows * entries * features / (1e-3 * row.median_ms) / rate
    return replace(row, note=f"{row.note}; {row.launch}, {row.cache}: {100 * share:.0f} % of the matrix product's rate")
