"""Queues of collapsed training: entries all equal, opposite, repeated, or equal to the query."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastssl_kernels import parity
from fastssl_kernels.parity import Inputs, make_inputs

BACKENDS = ("blockwise", "triton")

each_loss = pytest.mark.parametrize("loss", parity.LOSSES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_temperature = pytest.mark.parametrize("temperature", [0.01, 0.07])


def collapsed(cosine: int) -> Inputs:
    """All rows equal, and every queue entry equal or opposite to them."""
    vector = F.normalize(torch.ones(1, 16, dtype=torch.float64), dim=1)  # 1/4 each: exact in any dtype
    rows = vector.expand(4, 16)
    return Inputs(
        query=rows,
        key=rows,
        second_key=rows,
        queue=cosine * vector.expand(130, 16),
        query_labels=torch.tensor([0, 1, -1, 2]),
        queue_labels=torch.arange(130) % 2,
        target=torch.tensor([[0, 1, 2, 3], [3, 3, 129, 0]]),
        partner=torch.tensor([1, 2, 3, 3]),
        weight=torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("dtype", "temperature"),
    [(torch.float32, 0.01), (torch.float32, 0.07), (torch.bfloat16, 0.01), (torch.float16, 0.07)],
    ids=str,
)
@pytest.mark.parametrize("cosine", [1, -1])
@each_backend
@each_loss
def test_collapsed_queue(
    loss: str, backend: str, device: str, cosine: int, dtype: torch.dtype, temperature: float
) -> None:
    """A logit is as exact as the rounding of a row, scaled by log2(e) / temperature, to the queue's dtype.

    With equal components all round the same way, which is the worst case.
    """
    prepared = parity.prepare(loss, collapsed(cosine), dtype, device)
    result = parity.evaluate(loss, prepared, temperature, backend)
    truth = parity.evaluate_truth(loss, prepared, temperature)
    epsilon = torch.finfo(dtype).eps
    assert result.gradients.isfinite().all()
    torch.testing.assert_close(result.values, truth.values, rtol=1e-6, atol=epsilon / temperature)
    if loss == "update_groups":  # All groups tie, so any of them may have received the rows
        return
    # Terms of norm 1 / temperature cancel. The second moment of a read and the gradient of a batch are rounded to the
    # dtype, and a share of a bank's gradient is the exponential of a logit.
    tolerance = 1e-5
    if loss == "queue_read" or parity.LOSSES[loss].in_batch:
        tolerance = max(tolerance, epsilon)
    if loss == "bank_cross_entropy":
        tolerance = max(tolerance, math.expm1(epsilon / temperature))
    assert (result.gradients - truth.gradients).norm() < tolerance * (1 / temperature + truth.gradients.norm())


@each_temperature
@each_backend
@pytest.mark.parametrize("loss", [name for name in parity.LOSSES if name != "update_groups"])  # Equal entries tie
def test_entries_that_occur_three_times(loss: str, backend: str, device: str, temperature: float) -> None:
    given = make_inputs(17, 60, 48)
    given.queue, given.queue_labels = given.queue.repeat_interleave(3, 0), given.queue_labels.repeat_interleave(3)
    given.target *= 3
    prepared = parity.prepare(loss, given, torch.float32, device)
    result = parity.evaluate(loss, prepared, temperature, backend)
    errors = parity.errors(result, parity.evaluate_truth(loss, prepared, temperature))
    tolerated = parity.tolerances(loss, torch.float32)
    assert errors.loss < tolerated.loss * 0.07 / temperature
    assert errors.gradient < tolerated.gradient * 0.07 / temperature


@each_backend
@each_loss
def test_queries_that_are_in_the_queue(loss: str, backend: str, device: str) -> None:
    """A cosine of 1 at a temperature of 0.01: exp(1 / temperature) overflows float32.

    Logits are held to eps / temperature, of which a loss has one on either side, and shares are their exponentials.
    """
    given = make_inputs(9, 70, 64)
    given.key = given.second_key = given.query = given.query.sign() / 8  # Equal products in any implementation
    given.queue = torch.cat([given.query, given.queue[9:]])
    prepared = parity.prepare(loss, given, torch.float32, device)
    result = parity.evaluate(loss, prepared, 0.01, backend)
    truth = parity.evaluate_truth(loss, prepared, 0.01)
    either_side = 2 * torch.finfo(torch.float32).eps / 0.01
    torch.testing.assert_close(result.values, truth.values, rtol=1e-6, atol=either_side)
    assert (result.gradients - truth.gradients).norm() < 2.5e-5 * (100 + truth.gradients.norm())
