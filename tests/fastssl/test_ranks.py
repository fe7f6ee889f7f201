"""Two ranks that share a batch compute what one rank computes alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastssl.distributed import gather_rows, gather_rows_with_gradient, local_rows, rank, world_size
from fastssl.methods import METHODS
from fastssl.methods.queue_method import momentum_rows
from fastssl.models.norm import averaged_statistics, convert_to_sync
from tests.fastssl.rank_runs import a_method, a_run, assert_same_run, fork_ranks, join, part
from tests.fastssl.small_methods import a_batch

RANKS = 2
SPLIT_VARIANTS = {
    **{name: (name, {}) for name in METHODS},
    "mocov2 symmetric": ("mocov2", {"symmetric": True}),
    "unmix symmetric": ("unmix", {"symmetric": True}),
}
SYNC_VARIANTS = {
    **{name: (name, {}) for name in METHODS},
    "mocov2 head with batch norm": ("mocov2", {"head": "mlp-bn", "hidden_dim": 20}),
    "co2 head with batch norm": ("co2", {"head": "mlp-bn"}),
}
VARIANTS = {
    **{f"{variant} split": (*given, "split") for variant, given in SPLIT_VARIANTS.items()},
    **{f"{variant} sync": (*given, "sync") for variant, given in SYNC_VARIANTS.items()},
}
SHUFFLES, IMAGES = 300, 8


def run_of(variant):
    name, options, norm = VARIANTS[variant]
    method = a_method(name, options, norm)
    if name == "smog":
        method.train(norm == "sync")  # Its heads need the statistics of the whole batch
        method.prepare(iter([part(a_batch(name, 9))]))
    return a_run(method, range(3))


def gathering():
    rows = torch.arange(6.0).view(3, 2).add(10 * rank()).requires_grad_()
    everything = gather_rows_with_gradient(rows)
    (everything * torch.arange(12.0).view(6, 2) * (rank() + 1)).sum().backward()
    return world_size(), rank(), gather_rows(rows), everything.detach(), rows.grad


def norm_layers():
    return {
        "images": (nn.BatchNorm2d(3), torch.randn(8, 3, 4, 5).to(memory_format=torch.channels_last)),
        "rows": (nn.BatchNorm1d(3), torch.randn(8, 3)),
        "not affine": (nn.BatchNorm1d(3, affine=False), torch.randn(8, 3)),
    }


def normalization(kind):
    """Output, gradients and state of a batch norm in float64 whose two passes see this rank's part of a batch."""
    torch.manual_seed(5)
    layer, images = norm_layers()[kind]
    layer, images = layer.double(), 3 + 2 * images.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-1, 1)
    upstream = torch.randn_like(images)
    layer = nn.Sequential(convert_to_sync(layer) if world_size() > 1 else layer)
    mine = local_rows(images).clone().requires_grad_()
    layer(local_rows(images).flip(0))
    output = layer(mine)
    (output * local_rows(upstream)).sum().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    if world_size() > 1:
        for gradient in gradients:
            dist.all_reduce(gradient)
    return gather_rows(output), gather_rows(mine.grad), gradients, layer.state_dict()


def shuffling():
    """For many shuffles, the images whose keys this rank computed, and whether its rows came back in order."""
    computed = []

    def encoder(images):
        computed.append(images[:, 0].int())
        return images

    values = torch.arange(float(IMAGES))
    images = torch.stack([values, values + 1], 1)  # No two have the same direction
    in_order = True
    for seed in range(SHUFFLES):
        torch.manual_seed(seed)
        rows = momentum_rows(encoder, local_rows(images), shuffle=True)
        in_order &= torch.equal(rows, nn.functional.normalize(local_rows(images), dim=1))
    return torch.stack(computed), in_order


def a_rank(of_rank, store, results):
    join(store, of_rank, RANKS)
    torch.save({variant: run_of(variant) for variant in VARIANTS}, f"{results}{of_rank}")
    torch.save({kind: normalization(kind) for kind in norm_layers()}, f"{results}norm{of_rank}")
    torch.save(gathering(), f"{results}rows{of_rank}")
    torch.save(shuffling(), f"{results}shuffle{of_rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    arguments = (str(folder / "store"), str(folder / "results"))
    fork_ranks(a_rank, arguments, RANKS)
    return folder / "results"


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_equal_one(two_ranks, variant):
    expected = run_of(variant)
    for of_rank in range(RANKS):
        assert_same_run(torch.load(f"{two_ranks}{of_rank}")[variant], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", norm_layers())
def test_synchronized_batch_norm_is_that_of_the_whole_batch(two_ranks, kind):
    expected = normalization(kind)
    for of_rank in range(RANKS):
        torch.testing.assert_close(torch.load(f"{two_ranks}norm{of_rank}")[kind], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_gathered_rows_and_their_gradient(two_ranks):
    expected = torch.cat([torch.arange(6.0).view(3, 2), torch.arange(6.0).view(3, 2) + 10])
    for of_rank in range(RANKS):
        ranks, own, constant, with_gradient, gradient = torch.load(f"{two_ranks}rows{of_rank}")
        assert (ranks, own) == (2, of_rank)
        assert torch.equal(constant, expected)
        assert torch.equal(with_gradient, expected)
        # Both ranks' losses, weighted 1 and 2
        assert torch.equal(gradient, 3 * torch.arange(12.0).view(6, 2)[3 * of_rank : 3 * of_rank + 3])


@pytest.mark.slow
def test_shuffled_keys_share_batch_norm_with_their_queries_by_chance_alone(two_ranks):
    first, second = (torch.load(f"{two_ranks}shuffle{of_rank}") for of_rank in range(RANKS))
    assert first[1]
    assert second[1]
    # Each key is computed once, on one of the ranks
    everyone = torch.cat([first[0], second[0]], 1).sort(1).values
    assert torch.equal(everyone, torch.arange(IMAGES, dtype=torch.int32).expand(SHUFFLES, -1))
    queries_here = (first[0] < IMAGES // RANKS).sum(1)
    # 4 of 8, hypergeometric: mean 2, variance 4/7; all 4 its own once in 70 shuffles. Bounds of 4 standard deviations
    assert abs(queries_here.double().mean() - 2) < 4 * (4 / 7 / SHUFFLES) ** 0.5
    assert (queries_here == 4).sum() < SHUFFLES / 70 + 4 * (SHUFFLES / 70) ** 0.5
    with_query_of_image = (first[0] == 0).sum(1).double().mean()
    assert abs(with_query_of_image - 0.5) < 4 * (0.25 / SHUFFLES) ** 0.5


def test_a_single_process_gathers_its_own_rows():
    rows = torch.randn(4, 2, requires_grad=True)
    assert (world_size(), rank()) == (1, 0)
    assert torch.equal(gather_rows(rows), rows)
    assert not gather_rows(rows).requires_grad
    assert gather_rows_with_gradient(rows) is rows
    assert torch.equal(local_rows(rows), rows)


def test_statistics_of_a_single_process_are_not_changed():
    method = a_method("mocov2")
    method(a_batch("mocov2"))
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    with averaged_statistics(method):
        for name, buffer in method.named_buffers():
            assert torch.equal(buffer, before[name]), name
