"""Losses over a queue that is split over the ranks; names and arguments as in `fastssl_kernels`.

Each rank reads its shard for the queries of all ranks and sends every rank the results for that rank's rows. A read is
a logsumexp and a mean, so the reads of the shards combine into that of the queue. As the queue is constant, they also
hold the gradient, and backward needs no collective. All ranks must call a loss together, with equally many rows and
equal shards of one queue; each gets the mean over its own rows, exact up to rounding.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from fastssl.distributed import gather_rows, world_size
from fastssl_kernels import QueueRead, nearest_entry, queue_read


def info_nce(
    query: Tensor, key: Tensor, queue: Tensor, *, temperature: float, return_accuracy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrastive loss of each query's own key against all shards; see `fastssl_kernels.info_nce`.

    `queue`: this rank's shard, [K / ranks, C]. The accuracy needs another pass over the shard.
    """
    own = (query * key).sum(1)
    loss = softplus(sharded_read(query, queue, temperature=temperature).lse - own / temperature).mean()
    return (loss, (own.detach() >= largest_product(query, queue)).float().mean()) if return_accuracy else loss


def unmix(
    query: Tensor, first_key: Tensor, second_key: Tensor, queue: Tensor, *, weight: float | Tensor, temperature: float
) -> Tensor:
    """InfoNCE of a mixed image with both of its keys against all shards; see `fastssl_kernels.unmix`."""
    lse = sharded_read(query, queue, temperature=temperature).lse
    first, second = (softplus(lse - (query * key).sum(1) / temperature) for key in (first_key, second_key))
    return (weight * first + (1 - weight) * second).mean()


def mixco(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    first: Tensor,
    second: Tensor,
    weight: Tensor,
    temperature: float,
) -> Tensor:
    """Cross-entropy of mixed images against the batch's keys and all shards; see `fastssl_kernels.mixco`."""
    of_queue = sharded_read(query, queue, temperature=temperature)
    of_keys = queue_read(query, keys, temperature=temperature)
    target = torch.lerp(keys[second].to(query.dtype), keys[first].to(query.dtype), weight[:, None])
    return (torch.logaddexp(of_queue.lse, of_keys.lse) - (query * target).sum(1) / temperature).mean()


def soft_cross_entropy(
    query: Tensor, teacher: Tensor, queue: Tensor, *, temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy of the query's softmax over all shards against the teachers'; see the loss in `fastssl_kernels`."""
    target = sharded_read(teacher.flatten(0, -2), queue, temperature=teacher_temperature).mean
    target = target.view(-1, *query.shape).mean(0)
    lse = sharded_read(query, queue, temperature=temperature).lse
    return (lse - (query * target).sum(1) / temperature).mean()


def sharded_read(query: Tensor, shard: Tensor, *, temperature: float) -> QueueRead:
    """Read all shards [K / ranks, C] for the rows [N, C] of this rank; as `fastssl_kernels.queue_read`.

    `lse` is differentiable in `query`, for any upstream gradient; `mean` is constant.
    """
    with torch.no_grad():
        # The products would round them to the shard's dtype anyway
        all_queries = gather_rows(query.to(shard.dtype)).to(query.dtype)
        local = queue_read(all_queries, shard, temperature=temperature)
        lses, means = _of_all_shards(torch.cat([local.lse[:, None], local.mean], 1)).split([1, query.shape[1]], dim=2)
        lse = lses.logsumexp(0)
        mean = ((lses - lse).exp() * means).sum(0)
    # Adds zero to the value, and the gradient
    return QueueRead(lse[:, 0] + ((query - query.detach()) * mean).sum(1) / temperature, mean)


@torch.no_grad()
def largest_product(query: Tensor, shard: Tensor) -> Tensor:
    """The largest product [N] of each row [N, C] of this rank with a key of all shards [K / ranks, C]."""
    all_queries = gather_rows(query.to(shard.dtype)).to(query.dtype)
    nearest = shard[nearest_entry(all_queries, shard)]
    return _of_all_shards((all_queries * nearest).sum(1)).amax(0)


def _of_all_shards(rows: Tensor) -> Tensor:
    """Exchange this rank's results for all rows [ranks * N, ...] for all results for its rows [ranks, N, ...]."""
    received = torch.empty_like(rows)
    dist.all_to_all_single(received, rows)
    return received.unflatten(0, (world_size(), -1))
