"""A few training steps of a small method, alone or as one of several ranks that share each batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing

from fastssl.distributed import local_rows, mean_over_ranks, world_size
from fastssl.methods import TrainProgress
from fastssl.models.norm import averaged_statistics, convert_to_sync
from fastssl.models.queue import gather_state
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.executors.workers import context
from tests.fastssl.small_methods import a_batch, build

LR = 0.0005  # With more, ReSSL collapses in a few steps and its gradient is only rounding noise


def fork_ranks(function, arguments, ranks):
    """Call `function(rank, *arguments)` in a process per rank, forked from a server that has imported torch."""
    context()  # Sets what the fork server imports
    torch.multiprocessing.start_processes(function, arguments, nprocs=ranks, start_method="forkserver")


def join(store, rank, ranks):
    """Make this process rank `rank` of `ranks`, which find each other through the new file `store`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)


def part(batch: Batch) -> Batch:
    """This rank's part of a batch."""
    views = tuple(local_rows(view) for view in batch.views)
    return Batch(views=views, labels=local_rows(batch.labels), ids=local_rows(batch.ids), step=batch.step)


def a_method(name, options=None, norm="split"):
    """As `build`; batch norm in 4 splits of the whole batch, or over the whole batch."""
    if norm == "split":
        return build(name, splits=4 // world_size(), **(options or {}))
    method = build(name, "local", **(options or {}))
    return convert_to_sync(method) if world_size() > 1 else method


def a_run(method, steps):
    """Losses, metrics, gradients of the first layer and final state of steps with gradients averaged over ranks."""
    name = method.Config.name
    losses, metrics, gradients = [], [], []
    for step in steps:
        torch.manual_seed(step)
        output = method(part(a_batch(name, step)))
        output.loss.backward()
        losses.append(mean_over_ranks(output.loss.detach()))
        metrics.append({metric: mean_over_ranks(value) for metric, value in output.metrics.items()})
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter.grad = mean_over_ranks(parameter.grad)
                    parameter -= LR * parameter.grad
        gradients.append(method.encoder().conv1.weight.grad)
        method.zero_grad()
        method.after_step(output, TrainProgress(step, 50, 2))
    with averaged_statistics(method):
        state = {entry: value.clone() for entry, value in gather_state(method).items()}
    return losses, metrics, gradients, state


def assert_same_run(run, expected):
    """Assert equality up to rounding, which training amplifies."""
    losses, metrics, gradients, state = run
    expected_losses, expected_metrics, expected_gradients, expected_state = expected
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics, expected_metrics, rtol=1e-5, atol=0)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()
    assert state.keys() == expected_state.keys()
    for entry, value in expected_state.items():
        torch.testing.assert_close(
            state[entry], value, rtol=1e-4, atol=1e-5, msg=lambda text, at=entry: f"{at}: {text}"
        )
