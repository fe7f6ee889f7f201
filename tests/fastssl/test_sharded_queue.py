"""A queue that is split over the ranks gives the losses, gradients and keys of a whole queue."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import normalize

import fastssl_kernels
from fastssl.distributed import local_rows, world_size
from fastssl.errors import ConfigError
from fastssl.methods import METHODS
from fastssl.methods.sharded import sharded_read
from fastssl.methods.shared_options import ShardableQueueConfig
from fastssl.models.queue import KeyQueue, gather_state, queue_hash
from fastssl_kernels import queue_read
from tests.fastssl.rank_runs import a_method, a_run, assert_same_run, fork_ranks, join
from tests.fastssl.small_methods import QUEUE, SHARDABLE, build

WORLDS = (2, 4)
VARIANTS = {
    **{name: (name, {}) for name in SHARDABLE},
    "mocov2 symmetric": ("mocov2", {"symmetric": True}),
    "unmix symmetric": ("unmix", {"symmetric": True}),
    "ressl sharp": ("ressl", {"teacher_temperature": 0.005}),
}
BEFORE, AFTER = range(4), range(4, 6)  # The queue of 40 wraps around in three steps


def sharded(variant):
    name, options = VARIANTS[variant]
    return a_method(name, {**options, "shard_queue": True})


def whole(variant):
    return a_method(*VARIANTS[variant])


def resumed(variant, state):
    method = sharded(variant)
    method.load_state_dict(state)
    return a_run(method, AFTER)


def reading():
    """A float64 read of some rows and its gradient, with a different upstream gradient for each row."""
    torch.manual_seed(3)
    rows, bank = (normalize(torch.randn(count, 6, dtype=torch.float64), dim=1) for count in (8, 12))
    mine, upstream = local_rows(rows).clone().requires_grad_(), local_rows(torch.randn(8, dtype=torch.float64))
    read = queue_read if world_size() == 1 else sharded_read
    lse, mean = read(mine, local_rows(bank), temperature=0.05)
    (lse * upstream).sum().backward()
    return lse.detach(), mean.detach(), mine.grad


def uneven():
    with pytest.raises(ConfigError) as error:
        build("mocov2", queue_size=QUEUE + 2, shard_queue=True)
    return str(error.value)


def run_in_world(results, ranks, rank):
    runs, hashes, shapes = {}, {}, {}
    for variant in VARIANTS:
        method = sharded(variant)
        shapes[variant] = method.queue.keys.shape
        runs[variant] = a_run(method, BEFORE)
        hashes[variant] = queue_hash(method)
    torch.save((runs, hashes, shapes, reading()), f"{results}{ranks}-{rank}")


def a_process(rank, folder):
    if rank < 2:
        join(f"{folder}/two", rank, 2)
        run_in_world(f"{folder}/results", 2, rank)
        dist.destroy_process_group()
    join(f"{folder}/four", rank, 4)
    run_in_world(f"{folder}/results", 4, rank)
    saved = torch.load(f"{folder}/results2-0", weights_only=False)[0]
    runs = {variant: resumed(variant, saved[variant][-1]) for variant in VARIANTS}
    torch.save((runs, uneven()), f"{folder}/resumed{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    fork_ranks(a_process, (str(folder),), 4)
    return folder


def results(folder, ranks):
    return [torch.load(f"{folder}/results{ranks}-{rank}", weights_only=False) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_shards_train_like_the_whole_queue(folder, variant, ranks):
    expected = a_run(whole(variant), BEFORE)
    for runs, _, shapes, _ in results(folder, ranks):
        assert shapes[variant][0] == QUEUE // ranks
        assert_same_run(runs[variant], expected)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_two_ranks_continues_on_four_or_one(folder, variant):
    method = whole(variant)
    a_run(method, BEFORE)
    expected = a_run(method, AFTER)
    state = results(folder, 2)[0][0][variant][-1]
    assert_same_run(resumed(variant, state), expected)
    for rank in range(4):
        runs, _ = torch.load(f"{folder}/resumed{rank}")
        assert_same_run(runs[variant], expected)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", WORLDS)
def test_read_of_shards_and_its_gradient(folder, ranks):
    expected = reading()
    for rank, (*_, given) in enumerate(results(folder, ranks)):
        mine = tuple(value.chunk(ranks)[rank] for value in expected)
        torch.testing.assert_close(given, mine, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", WORLDS)
def test_hash_of_shards_is_that_of_the_whole_queue(folder, ranks):
    everyone = results(folder, ranks)
    for variant in VARIANTS:
        method = whole(variant)
        method.load_state_dict(everyone[0][0][variant][-1])
        assert {hashes[variant] for _, hashes, _, _ in everyone} == {queue_hash(method)}


def test_the_hash_depends_on_keys_labels_and_positions():
    def changed(change):
        torch.manual_seed(0)
        queue = KeyQueue(12, 4)
        queue.enqueue(queue.keys[:5].clone(), torch.arange(5), 0)
        change(queue)
        return queue_hash(torch.nn.ModuleList([KeyQueue(3, 2, torch.Generator().manual_seed(1)), queue]))

    def turn_one_bit(queue):
        queue.keys.view(torch.int32)[7, 2] ^= 1

    def swap_keys(queue):
        queue.keys[[1, 2]] = queue.keys[[2, 1]]

    def swap_features(queue):
        queue.keys[:, [1, 2]] = queue.keys[:, [2, 1]]

    def swap_labels(queue):
        queue.labels[[1, 2]] = queue.labels[[2, 1]]

    def nothing(queue):
        pass

    hashes = [changed(change) for change in (nothing, turn_one_bit, swap_keys, swap_features, swap_labels)]
    assert len(set(hashes)) == len(hashes)
    assert changed(nothing) == hashes[0]


def test_one_process_has_the_whole_queue_and_its_fused_losses():
    method = build("mocov2", shard_queue=True)
    assert method.queue.keys.shape[0] == QUEUE
    assert method.losses is fastssl_kernels
    state = gather_state(method)
    assert all(torch.equal(state[name], value) for name, value in method.state_dict().items())


@pytest.mark.slow
def test_a_queue_that_ranks_cannot_share_evenly(folder):
    for rank in range(4):
        _, message = torch.load(f"{folder}/resumed{rank}")
        assert message == (
            "--method.queue-size 42 was given with --method.shard-queue on 4 devices; it must be a multiple of 4"
        )


def test_unusable_options_are_refused():
    with pytest.raises(ValueError, match="a queue of 7 keys in 2 shards"):
        KeyQueue(7, 2, shards=2)
    with_a_queue = {name for name, method in METHODS.items() if issubclass(method.Config, ShardableQueueConfig)}
    assert set(SHARDABLE) < with_a_queue
    for name in with_a_queue - set(SHARDABLE):
        with pytest.raises(ConfigError, match=f"--method.shard-queue was given with {name}, .*mixco, mocov1, mocov2"):
            METHODS[name].Config(shard_queue=True)
