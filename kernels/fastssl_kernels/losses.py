"""The public losses, and the reads of a bank that they are built on."""

from __future__ import annotations

import torch
from torch import Tensor

from . import contract, ops, reference
from .backend import dispatches_to_reference, requested
from .rows import QueueRead, reduce_rows, row_weights, stack_targets, stack_teachers


@dispatches_to_reference(reference.info_nce)
def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrastive loss of each query's own key against a queue of negatives (MoCo, arXiv 1911.05722).

    Row loss: log(exp(q.k / t) + sum over the queue of exp(q.m / t)) - q.k / t.

    `query`, `key`: [N, C]. `queue`: [K, C]. Rows are L2-normalized; dtypes float32, bfloat16 or float16 in any
    combination, or all float64. Products with the queue take both operands in the queue's dtype (blockwise: in
    float32) and accumulate in float32; the positive pair is multiplied in float32. Autocast has no effect. Only
    `query` gets a gradient, computed in the forward pass, so the queue may be overwritten before backward.

    Returns float32 (float64 for float64): a scalar for reduction "mean", [N] for "none". With `return_accuracy`,
    (loss, accuracy): the share of rows (per row 0 or 1 for "none") whose own key is at least as near as every queue
    entry; a tie within rounding may count either way.

    `temperature`: a number from 0.001 to 1000. Tensors may have any strides; a queue that is not contiguous is
    copied. A NaN in the queue makes every row NaN; a NaN in a row makes that row NaN.

    Raises TypeError or ValueError for other inputs; with FASTSSL_DEBUG=1 also for rows that are not unit vectors.
    """
    contract.check_pairs(query, queue, key=key)
    contract.check_temperature(temperature)
    contract.check_switch(return_accuracy=return_accuracy)
    loss, _, accuracy = ops.info_nce(query, key, queue, float(temperature), return_accuracy, requested())
    return reduce_rows(loss, reduction, accuracy if return_accuracy else None)


@dispatches_to_reference(reference.unicon)
def unicon(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Contrastive loss with queue entries of the query's class as positives too (UniMoCo, arXiv 2103.10773).

    Row loss: log(1 + sum over negatives of exp(q.m / t) * sum over positives of exp(-q.m / t)).

    `query_labels`: int64 [N]. `queue_labels`: int64 [K]. -1 is unknown. A queue entry is positive if its label is
    known and equals the query's, else negative, so for an unlabeled query this is `info_nce`. A row without
    negatives has loss 0. A label below -1 is a ValueError on a CPU; elsewhere, where checking would wait for the
    device, it makes its row NaN, and in the queue all rows. Otherwise as `info_nce`; accuracy is that of the own
    key, as in MoCo.
    """
    contract.check_pairs(query, queue, key=key)
    contract.check_labels(query, queue, query_labels, queue_labels)
    contract.check_temperature(temperature)
    contract.check_switch(return_accuracy=return_accuracy)
    loss, _, accuracy = ops.unicon(
        query, key, queue, query_labels, queue_labels, float(temperature), return_accuracy, requested()
    )
    return reduce_rows(loss, reduction, accuracy if return_accuracy else None)


@dispatches_to_reference(reference.sup_con)
def sup_con(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    query_labels: Tensor,
    queue_labels: Tensor,
    temperature: float,
    reduction: str = "mean",
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Supervised contrastive loss of a query against its key and the queue (arXiv 2004.11362, eq. 2).

    Row loss: log(sum over key and queue of exp(q.m / t)) - mean over positives of q.p / t. The own key is always a
    positive. There is no factor t / base temperature. Arguments as in `unicon`; for a batch without a queue, see
    `nt_xent` with labels.
    """
    contract.check_pairs(query, queue, key=key)
    contract.check_labels(query, queue, query_labels, queue_labels)
    contract.check_temperature(temperature)
    contract.check_switch(return_accuracy=return_accuracy)
    loss, _, accuracy = ops.sup_con(
        query, key, queue, query_labels, queue_labels, float(temperature), return_accuracy, requested()
    )
    return reduce_rows(loss, reduction, accuracy if return_accuracy else None)


@dispatches_to_reference(reference.soft_cross_entropy)
def soft_cross_entropy(
    query: Tensor,
    teacher: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the query's softmax over the queue against the teacher's (ReSSL, MSVQ).

    Row loss: -sum over the queue of softmax(teacher.m / teacher_temperature) * log softmax(q.m / t) (arXiv
    2107.09282). `teacher`: [N, C], or [T, N, C] for T teachers whose losses are averaged. There is no own key.
    Dtypes, gradient, reduction and errors as in `info_nce`.
    """
    contract.check_teacher(query, teacher, queue)
    contract.check_temperature(temperature)
    contract.check_temperature(teacher_temperature, "teacher_temperature")
    loss, _, _ = ops.soft_cross_entropy(
        query, stack_teachers(teacher), queue, float(temperature), float(teacher_temperature), requested()
    )
    return reduce_rows(loss, reduction)


@dispatches_to_reference(reference.consistency)
def consistency(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    include_positive: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Symmetric KL divergence of the query's and the key's softmax over the queue (CO2, arXiv 2010.02217).

    Row loss: (KL(P | Q) + KL(Q | P)) / 2 with P = softmax(k.m / t), Q = softmax(q.m / t). The paper's distributions
    cover only the queue; `include_positive` adds the logit q.k / t to both, as lightly does. Dtypes, gradient (to
    `query`), reduction and errors as in `info_nce`.
    """
    contract.check_pairs(query, queue, key=key)
    contract.check_temperature(temperature)
    contract.check_switch(include_positive=include_positive)
    loss, _, _ = ops.consistency(query, key, queue, float(temperature), include_positive, requested())
    return reduce_rows(loss, reduction)


@dispatches_to_reference(reference.mixco)
def mixco(
    query: Tensor,
    keys: Tensor,
    queue: Tensor,
    *,
    first: Tensor,
    second: Tensor,
    weight: float | Tensor,
    temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of mixed images against the keys of the batch and the queue (MixCo, arXiv 2010.06300).

    Row loss: log(sum over keys and queue of exp(q.m / t)) - (w q.keys[first] + (1 - w) q.keys[second]) / t.

    `query`: [M, C], one row per mixed image. `keys`: [B, C], of the batch's unmixed images. `first`, `second`:
    int64 [M], indices into `keys`. `weight`: a number in [0, 1], or [M]. Dtypes, gradient, reduction and errors as
    in `info_nce`. An index outside `keys` is an IndexError on a CPU and makes its row NaN on a GPU, where checking
    would wait for the device.
    """
    contract.check_rows(query=query, keys=keys, queue=queue)
    contract.check_index(query, first=first, second=second)
    contract.check_weight(query, weight)
    contract.check_temperature(temperature)
    loss, _, _ = ops.mixco(
        query, keys, queue, first, second, row_weights(query, weight), float(temperature), requested()
    )
    return reduce_rows(loss, reduction)


@dispatches_to_reference(reference.unmix)
def unmix(
    query: Tensor,
    first_key: Tensor,
    second_key: Tensor,
    queue: Tensor,
    *,
    weight: float | Tensor,
    temperature: float,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE of a mixed image with both its keys, over the same negatives (Un-Mix, arXiv 2003.05438).

    Row loss: weight * InfoNCE(query, first_key) + (1 - weight) * InfoNCE(query, second_key). `weight`: a number in
    [0, 1], or [N]. Otherwise as `info_nce`.
    """
    contract.check_pairs(query, queue, first_key=first_key, second_key=second_key)
    contract.check_weight(query, weight)
    contract.check_temperature(temperature)
    loss, _, _ = ops.unmix(
        query, first_key, second_key, queue, row_weights(query, weight), float(temperature), requested()
    )
    return reduce_rows(loss, reduction)


@dispatches_to_reference(reference.mean_shift)
def mean_shift(query: Tensor, key: Tensor, queue: Tensor, *, k: int, reduction: str = "mean") -> Tensor:
    """Mean squared distance of a query to the k queue entries nearest to its key (MSF, arXiv 2105.07269).

    Row loss: mean over the k entries with the largest key.m of 2 - 2 q.m. MSF enqueues the keys first, so the own
    key is among them. Ties for the last place are broken arbitrarily. A NaN in the queue is nearest to every key; a
    non-finite key gives NaN. Dtypes, gradient (to `query`), reduction and errors as in `info_nce`.
    """
    contract.check_pairs(query, queue, key=key)
    contract.check_neighbors(queue, k)
    loss, _, _ = ops.mean_shift(query, key, queue, int(k), requested())
    return reduce_rows(loss, reduction)


@dispatches_to_reference(reference.bank_cross_entropy)
def bank_cross_entropy(
    prediction: Tensor, bank: Tensor, target: Tensor, *, temperature: float, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of each row's softmax over a bank against its target entry, with a gradient to the bank too.

    Row loss: log(sum over the bank of exp(p.b / t)) - p.b[target] / t. `prediction`: [N, C]. `bank`: [K, C].
    `target`: int64 [N], or [T, N] for T targets whose losses are averaged. Dtypes, reduction and errors as in
    `info_nce`. `prediction` gets a gradient, and `bank` if it requires one: backward then reads it again, so it
    must not be overwritten before. A target outside the bank is an IndexError on a CPU and a NaN on a GPU, where
    checking would wait for the device.
    """
    contract.check_targets(prediction, bank, target)
    contract.check_temperature(temperature)
    loss, _, _ = ops.bank_cross_entropy(prediction, bank, stack_targets(target), float(temperature), requested())
    return reduce_rows(loss, reduction)


@dispatches_to_reference(reference.nearest_entry)
def nearest_entry(query: Tensor, bank: Tensor) -> Tensor:
    """Index of the bank entry with the largest dot product with each row: int64 [N]; the first of equal ones.

    Products count as computed: a matrix product may round those of two equal entries differently. A NaN counts as
    the largest product: a row of NaN gets entry 0, and every row gets the first entry of NaN. `query`: [N, C].
    `bank`: [K, C]. Neither gets a gradient. Dtypes and errors as in `info_nce`.
    """
    contract.check_rows(("bank",), query=query, bank=bank)
    return ops.nearest(query.detach(), bank.detach(), 1, requested())[:, 0]


@dispatches_to_reference(reference.nt_xent)
def nt_xent(
    first: Tensor, second: Tensor, *, temperature: float, labels: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Normalized cross-entropy of two views of a batch (SimCLR, arXiv 2002.05709), or SupCon in a batch.

    The 2N rows are those of `first`, then those of `second`, both [N, C] and of one dtype. Row loss:
    log(sum over the other 2N - 1 rows of exp(x.y / t)) - x.(the other view) / t. With `labels`, int64 [N],
    -1 = unknown, all other rows of a known label are positives and the second term is their mean: the
    supervised contrastive loss (arXiv 2004.11362, eq. 2), without a factor t / base temperature. A label
    below -1 is a ValueError on a CPU, and NaN in all rows elsewhere, where checking would wait for the device.

    The mean is over the 2N rows; reduction "none" gives [2N]. Both views get a gradient; backward reads its own
    copy of them again. Dtypes and errors as in `info_nce`.
    """
    contract.check_views(first, second, labels)
    contract.check_temperature(temperature)
    rows = torch.cat([first, second])
    own = torch.arange(len(first), device=first.device)
    classes = own if labels is None else labels
    loss, *_ = ops.nt_xent(rows, classes.repeat(2), float(temperature), requested())
    return reduce_rows(loss, reduction)


@dispatches_to_reference(reference.queue_read)
def queue_read(query: Tensor, bank: Tensor, *, temperature: float) -> QueueRead:
    """Logsumexp of q.m / t over a bank, and the bank's mean weighted by the softmax of q.m / t.

    `query`: [N, C]. `bank`: [K, C], constant. Dtypes and errors as in `info_nce`. Returns `lse` [N] and `mean` [N,
    C] in float32 (float64 for float64). Both are differentiable in `query`; backward reads the bank again, so it
    must not be overwritten before. The gradient of `lse` is mean / t.
    """
    contract.check_rows(query=query, bank=bank)
    contract.check_temperature(temperature)
    return QueueRead(*ops.queue_read(query, bank, float(temperature), requested()))
