"""Two ranks that share a batch compute what one rank computes alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from fastssl.methods import METHODS, Clock
from fastssl.train.distributed import gather_rows, gather_rows_with_gradient, local_rows, rank, world_size
from fastssl_pipelines.batch import Batch
from tests.fastssl.small_methods import LR, a_batch, build

RANKS, STEPS = 2, 3
VARIANTS = {
    **{name: (name, {}) for name in METHODS},
    "mocov2 symmetric": ("mocov2", {"symmetric": True}),
    "unmix symmetric": ("unmix", {"symmetric": True}),
}


def part(batch: Batch) -> Batch:
    """What this rank sees of a batch."""
    views = tuple(local_rows(view) for view in batch.views)
    return Batch(views=views, labels=local_rows(batch.labels), ids=local_rows(batch.ids), step=batch.step)


def mean_over_ranks(value):
    total = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total / world_size()


def a_run(variant):
    """Losses, gradients of the first layer and final buffers of a few steps whose gradients are averaged over ranks."""
    name, options = VARIANTS[variant]
    method = build(name, splits=4 // world_size(), **options)
    if name == "smog":
        method.eval()  # its heads need the statistics of the whole batch, which takes synchronised batch norm
        method.prepare(iter([part(a_batch(name, 9))]))
    losses, gradients = [], []
    for number in range(STEPS):
        batch = a_batch(name, number)
        torch.manual_seed(number)
        output = method(part(batch))
        output.loss.backward()
        losses.append(mean_over_ranks(output.loss))
        with torch.no_grad():
            for parameter in method.parameters():
                if parameter.grad is not None:
                    parameter.grad = mean_over_ranks(parameter.grad)
                    parameter -= LR * parameter.grad
        gradients.append(method.encoder().conv1.weight.grad)
        method.zero_grad()
        method.after_step(output, Clock(number, 50, 2))
    buffers = {name: value for name, value in method.state_dict().items() if "encoder" not in name}
    return losses, gradients, buffers


def a_rank(number, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=RANKS)
    torch.save({variant: a_run(variant) for variant in VARIANTS}, f"{results}{number}")
    rows = torch.arange(6.0).view(3, 2).add(10 * number).requires_grad_()
    everything = gather_rows_with_gradient(rows)
    (everything * torch.arange(12.0).view(6, 2) * (number + 1)).sum().backward()
    torch.save((world_size(), rank(), gather_rows(rows), everything.detach(), rows.grad), f"{results}rows{number}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (str(folder / "store"), str(folder / "results"))
    torch.multiprocessing.spawn(a_rank, arguments, nprocs=RANKS)
    return folder / "results"


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one(two_ranks, variant):
    losses, gradients, buffers = a_run(variant)
    for number in range(RANKS):
        their_losses, their_gradients, their_buffers = torch.load(f"{two_ranks}{number}")[variant]
        torch.testing.assert_close(their_losses, losses, rtol=1e-5, atol=0)
        for gradient, expected in zip(their_gradients, gradients, strict=True):
            assert (gradient - expected).norm() <= 1e-4 * expected.norm()
        for entry, expected in buffers.items():
            torch.testing.assert_close(their_buffers[entry], expected, rtol=1e-4, atol=1e-5)


def test_gathered_rows_and_their_gradient(two_ranks):
    expected = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10])
    for number in range(RANKS):
        ranks, own, constant, with_gradient, gradient = torch.load(f"{two_ranks}rows{number}")
        assert (ranks, own) == (2, number)
        assert torch.equal(constant, expected)
        assert torch.equal(with_gradient, expected)
        # both ranks' losses, weighted 1 and 2
        assert torch.equal(gradient, 3 * torch.arange(12.0).view(6, 2)[3 * number : 3 * number + 3])


def test_one_process_gathers_itself():
    rows = torch.randn(4, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert torch.equal(gather_rows(rows), rows)
    assert not gather_rows(rows).requires_grad
    assert gather_rows_with_gradient(rows) is rows
    assert torch.equal(local_rows(rows), rows)
