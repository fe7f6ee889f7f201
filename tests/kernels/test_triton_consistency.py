"""The moment read on Triton: CO2's consistency loss and the gradient of a queue read, against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl_kernels import available_backends, parity, reference

if available_backends("cpu")["triton"] and not torch.cuda.is_available():
    pytest.skip("Triton runs neither on a GPU nor interpreted here", allow_module_level=True)

from fastssl_kernels.triton import consistency
from fastssl_kernels.triton.consistency import consistency_rows, queue_read_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = ["consistency", "consistency+positive"]
# Rows, entries, features, temperature; 0.01 needs a running maximum
CASES = [(5, 130, 16, 0.04), (5, 130, 16, 0.01), (20, 200, 128, 0.07), (3, 37, 5, 1.0), (9, 65, 130, 0.2)]


def inputs(rows: int, entries: int, features: int, dtype: torch.dtype) -> parity.Inputs:
    return parity.make_inputs(rows, entries, features).to(torch.float32, dtype, DEVICE)


def consistency_errors(given: parity.Inputs, temperature: float, loss: str) -> parity.Errors:
    truth = parity.evaluate(loss, given.to(torch.float64, torch.float64), temperature, "reference")
    rows = consistency_rows(given.query, given.key, given.queue, temperature, loss.endswith("positive"))
    # The weights of `evaluate`
    weights = torch.randn(len(given.query), generator=torch.Generator().manual_seed(17), dtype=torch.float64)
    gradient = rows.gradient.double().cpu() * weights[:, None]
    return parity.errors(parity.Result(rows.loss.double().cpu(), gradient.flatten()), truth)


def read_gradient_error(given: parity.Inputs, lse: Tensor, mean: Tensor, temperature: float) -> float:
    exact = given.to(torch.float64, torch.float64)
    query = exact.query.requires_grad_()
    outputs = reference.queue_read(query, exact.queue, temperature=temperature)
    (truth,) = torch.autograd.grad((outputs.lse * lse).sum() + (outputs.mean * mean).sum(), query)
    result = queue_read_gradient(given.query, given.queue, lse.float(), mean.float(), temperature)
    return ((result - truth).norm() / truth.norm()).item()


def upstream(given: parity.Inputs) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    lse = torch.randn(len(given.query), generator=generator, dtype=torch.float64)
    mean = torch.randn(given.query.shape, generator=generator, dtype=torch.float64)
    return lse.to(DEVICE), mean.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", VARIANTS)
def test_triton_consistency_matches_float64(loss: str, dtype: torch.dtype) -> None:
    limits = parity.tolerances(loss, dtype)
    for *shape, temperature in CASES:
        error = consistency_errors(inputs(*shape, dtype), temperature, loss)
        assert error.loss <= limits.loss, (shape, temperature, error)
        assert error.gradient <= limits.gradient, (shape, temperature, error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_consistency_accepts_wide_rows(dtype: torch.dtype) -> None:
    given, limits = inputs(2, 40, 512, dtype), parity.tolerances("consistency", dtype)
    error = consistency_errors(given, 0.2, "consistency")
    assert error.loss <= limits.loss
    assert error.gradient <= limits.gradient
    assert read_gradient_error(given, *upstream(given), 0.2) <= parity.tolerances("queue_read", dtype).gradient


@pytest.mark.parametrize("loss", VARIANTS)
def test_triton_consistency_corrects_the_loss_for_the_rounding_of_the_rows(loss: str) -> None:
    # Without correction the error is about 1e-3
    assert consistency_errors(inputs(20, 200, 128, torch.bfloat16), 0.07, loss).loss < 2e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_consistency_of_close_pairs(dtype: torch.dtype) -> None:
    given = inputs(6, 100, 32, dtype)
    given.key = F.normalize(given.query + 0.01 * given.key, dim=1)
    error = consistency_errors(given, 0.1, "consistency")
    # Rounding each softmax before their difference would cost 20 % of a bfloat16 gradient.
    assert error.gradient <= parity.tolerances("consistency", dtype).gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positive", [False, True])
def test_triton_consistency_of_equal_rows_is_exactly_zero(dtype: torch.dtype, positive: bool) -> None:
    given = inputs(5, 130, 16, dtype)
    for temperature in (0.01, 0.2):
        rows = consistency_rows(given.query, given.query.clone(), given.queue, temperature, positive)
        assert not rows.loss.any()
        assert not rows.gradient.any()


def test_triton_consistency_is_symmetric() -> None:
    given = inputs(7, 40, 20, torch.float32)
    for positive in (False, True):
        there = consistency_rows(given.query, given.key, given.queue, 0.1, positive).loss
        back = consistency_rows(given.key, given.query, given.queue, 0.1, positive).loss
        torch.testing.assert_close(there, back, rtol=2e-6, atol=0)


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_triton_consistency_does_not_depend_on_the_splits(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    given = inputs(3, 600, 16, torch.float32)
    make_plan, splits = consistency.make_plan, []

    def recorded(*arguments: Any, **options: Any) -> Any:
        plan = make_plan(*arguments, **options)
        splits.append(plan.splits)
        return plan

    monkeypatch.setattr(consistency, "make_plan", recorded)
    results = []
    for count in (8, 1, 1):
        monkeypatch.setattr(consistency, "processors", lambda device, count=count: count)
        results.append(consistency_rows(given.query, given.key, given.queue, temperature, True))
    assert min(splits[:2]) > 1
    assert splits[2:] == [1, 1, 1, 1]
    many, whole, again = results
    torch.testing.assert_close(many.loss, whole.loss, rtol=2e-6, atol=0)
    assert (many.gradient - whole.gradient).norm() <= 2e-5 * whole.gradient.norm()
    assert torch.equal(again.loss, whole.loss)
    assert torch.equal(again.gradient, whole.gradient)


def test_triton_consistency_accepts_any_strides_and_16_bit_rows() -> None:
    given = inputs(5, 70, 24, torch.bfloat16).to(torch.bfloat16, torch.bfloat16, DEVICE)
    expected = consistency_rows(given.query, given.key, given.queue, 0.1, False)
    wide = torch.full((70, 40), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    wide[:, :24] = given.queue
    for queue in (wide[:, :24], given.queue.T.contiguous().T):
        rows = consistency_rows(given.query.T.contiguous().T, given.key, queue, 0.1, False)
        assert torch.equal(rows.loss, expected.loss)
        assert torch.equal(rows.gradient, expected.gradient)
    assert expected.loss.dtype == expected.gradient.dtype == torch.float32
    assert expected.accuracy.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_queue_read_gradient_matches_float64(dtype: torch.dtype) -> None:
    limit = parity.tolerances("queue_read", dtype).gradient
    for *shape, temperature in CASES[2:]:
        given = inputs(*shape, dtype)
        assert read_gradient_error(given, *upstream(given), temperature) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_queue_read_gradient_of_one_output(dtype: torch.dtype) -> None:
    given = inputs(5, 130, 16, dtype)
    lse, mean = upstream(given)
    assert read_gradient_error(given, lse, 0 * mean, 0.1) <= parity.tolerances("queue_read", dtype).gradient
    # For the mean alone it is a difference of nearly equal terms, as in CO2
    assert read_gradient_error(given, 0 * lse, mean, 0.1) <= parity.tolerances("consistency", dtype).gradient


def test_triton_queue_read_gradient_at_a_low_temperature() -> None:
    given = inputs(5, 130, 16, torch.float32)
    assert read_gradient_error(given, *upstream(given), 0.01) <= 1e-5


@pytest.mark.parametrize("factor", [2.0**20, 2.0**-40])
def test_triton_queue_read_gradient_scales_with_its_upstream(factor: float) -> None:
    given = inputs(5, 130, 16, torch.float16)
    lse, mean = (x.float() for x in upstream(given))
    once = queue_read_gradient(given.query, given.queue, lse, mean, 0.1)
    scaled = queue_read_gradient(given.query, given.queue, factor * lse, factor * mean, 0.1)
    torch.testing.assert_close(scaled / factor, once, rtol=1e-6, atol=1e-6)


def test_triton_queue_read_gradient_accepts_any_strides() -> None:
    given = inputs(5, 40, 16, torch.float32)
    lse, mean = (x.float() for x in upstream(given))
    expected = queue_read_gradient(given.query, given.queue, lse, mean, 0.1)
    turned = [x.T.contiguous().T for x in (given.query, given.queue, mean)]
    assert torch.equal(queue_read_gradient(turned[0], turned[1], lse, turned[2], 0.1), expected)


def test_triton_queue_read_gradient_of_nothing_is_zero() -> None:
    given = inputs(5, 130, 16, torch.float16)
    zero = torch.zeros((), device=DEVICE)
    gradient = queue_read_gradient(given.query, given.queue, zero.expand(5), zero.expand(5, 16), 0.1)
    assert not gradient.any()
