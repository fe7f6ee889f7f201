"""Every loss on every backend against its float64 definition: values and gradients, for any shape."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl_kernels import parity, use_backend
from fastssl_kernels.parity import Inputs, make_inputs

# Rows, entries and features that fill no tile, one of each, and temperatures down to 0.01, where exp(1 / t) overflows
# float32. With one entry a loss may be 0 and its error is that of the logits, so their scale is 1.
CASES = (
    ((1, 1, 32), 1.0),
    ((33, 1, 128), 1.0),
    ((7, 5, 5), 0.07),
    ((7, 300, 64), 1.0),
    ((33, 127, 48), 0.07),
    ((65, 300, 128), 0.07),
)
COLD_CASES = (((7, 5, 5), 0.01), ((9, 127, 20), 0.01), ((33, 127, 48), 0.01))
# Smaller, because the interpreter runs programs sequentially
TRITON_CASES = (((1, 1, 32), 1.0), ((7, 5, 5), 0.07), ((9, 300, 32), 0.2), ((17, 127, 48), 0.07), ((65, 40, 16), 1.0))
TRITON_COLD_CASES = COLD_CASES[:2]
# Rounding a row to bfloat16 moves a logit by up to 0.004 / temperature; many features average that out
CASES_OF_16_BITS = ((torch.bfloat16, (17, 70, 128), 0.2), (torch.float16, (9, 127, 128), 0.07))

each_loss = pytest.mark.parametrize("loss", parity.LOSSES)
each_backend = pytest.mark.parametrize("backend", ["blockwise", "triton"])


def on_backends(blockwise: tuple[Any, ...], triton: tuple[Any, ...]) -> pytest.MarkDecorator:
    cases = [("blockwise", *case) for case in blockwise] + [("triton", *case) for case in triton]
    return pytest.mark.parametrize(("backend", "shape", "temperature"), cases, ids=str)


def assert_matches(
    loss: str, backend: str, device: str, inputs: Inputs, dtype: torch.dtype, temperature: float
) -> None:
    prepared = parity.prepare(loss, inputs, dtype, device)
    result = parity.evaluate(loss, prepared, temperature, backend)
    errors = parity.errors(result, parity.evaluate_truth(loss, prepared, temperature))
    tolerated = parity.tolerances(loss, dtype)
    assert errors.loss < tolerated.loss
    assert errors.gradient < tolerated.gradient


def assert_no_worse_than_the_definition(
    loss: str, backend: str, device: str, inputs: Inputs, temperature: float
) -> None:
    """In float32, on inputs for which the definition itself may miss the tolerance in float32.

    Logits, up to 1 / temperature, are held to eps / temperature, and shares are their exponentials.
    """
    prepared = parity.prepare(loss, inputs, torch.float32, device)
    truth = parity.evaluate_truth(loss, prepared, temperature)
    errors = parity.errors(parity.evaluate(loss, prepared, temperature, backend), truth)
    plain = parity.errors(parity.evaluate(loss, prepared, temperature, "reference"), truth)
    tolerated, eps = parity.tolerances(loss, torch.float32), torch.finfo(torch.float32).eps
    # Triton subtracts two sums, each up to |key - query| / temperature, so a tiny difference has their rounding
    terms = (prepared.key - prepared.query).norm() / temperature / truth.values.norm()
    rounding = eps * terms.item() if backend == "triton" and parity.LOSSES[loss].difference else 0.0
    assert errors.loss < max(tolerated.loss, 4 * plain.loss, rounding)
    assert errors.gradient < max(tolerated.gradient, 4 * plain.gradient, 2 * eps / temperature)


@on_backends(CASES, TRITON_CASES)
@each_loss
def test_every_loss_in_float32(
    loss: str, backend: str, device: str, shape: tuple[int, int, int], temperature: float
) -> None:
    assert_matches(loss, backend, device, make_inputs(*shape), torch.float32, temperature)


@pytest.mark.parametrize(("shape", "temperature"), CASES + COLD_CASES, ids=str)
@each_loss
def test_every_loss_in_float64(loss: str, shape: tuple[int, int, int], temperature: float) -> None:
    assert_matches(loss, "blockwise", "cpu", make_inputs(*shape), torch.float64, temperature)


@pytest.mark.parametrize(("dtype", "shape", "temperature"), CASES_OF_16_BITS, ids=str)
@each_backend
@each_loss
def test_every_loss_with_a_bank_of_16_bits(
    loss: str, backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int, int], temperature: float
) -> None:
    assert_matches(loss, backend, device, make_inputs(*shape), dtype, temperature)


@each_backend
@each_loss
def test_bfloat16_at_a_low_temperature(loss: str, backend: str, device: str) -> None:
    assert_matches(loss, backend, device, make_inputs(33, 127, 128), torch.bfloat16, 0.07)


@on_backends(COLD_CASES, TRITON_COLD_CASES)
@each_loss
def test_float32_at_temperatures_that_overflow(
    loss: str, backend: str, device: str, shape: tuple[int, int, int], temperature: float
) -> None:
    assert_no_worse_than_the_definition(loss, backend, device, make_inputs(*shape), temperature)


@each_loss
def test_several_chunks_of_rows_and_blocks_of_the_bank(loss: str) -> None:
    assert_matches(loss, "blockwise", "cpu", make_inputs(300, 9000, 16), torch.float64, 0.07)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    entries=st.integers(2, 60),
    features=st.integers(2, 70),
    temperature=st.floats(0.2, 2),
    seed=st.integers(0, 99),
)
@each_backend
@each_loss
def test_any_shape_and_temperature(
    loss: str, backend: str, rows: int, entries: int, features: int, temperature: float, seed: int
) -> None:
    """With few entries a loss may be tiny."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    inputs = make_inputs(rows, entries, features, seed)
    assert_no_worse_than_the_definition(loss, backend, device, inputs, temperature)


@each_loss
def test_gradcheck(loss: str) -> None:
    inputs, entry = make_inputs(5, 11, 6), parity.LOSSES[loss]

    def rows(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(entry.call(replace(inputs, **dict(zip(entry.gradients, leaves, strict=True))), 0.2))

    with use_backend("blockwise"):
        assert torch.autograd.gradcheck(rows, [getattr(inputs, name).requires_grad_() for name in entry.gradients])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_backend
@each_loss
def test_two_runs_are_bitwise_equal(loss: str, backend: str, device: str, dtype: torch.dtype) -> None:
    prepared = parity.prepare(loss, make_inputs(9, 127, 20), dtype, device)
    first, second = (parity.evaluate(loss, prepared, 0.07, backend) for _ in range(2))
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.gradients, second.gradients)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(2, 40), st.integers(2, 20)),
    pads=st.tuples(*[st.tuples(st.integers(1, 3), st.integers(0, 4), st.booleans())] * 9),
)
@each_loss
def test_any_strides(loss: str, shape: tuple[int, int, int], pads: tuple[tuple[int, int, bool], ...]) -> None:
    """Each input with a different step, padding and order of axes; the gaps hold NaN or invalid labels."""
    prepared = parity.prepare(loss, make_inputs(*shape), torch.float32)
    names = [field.name for field in fields(Inputs)]
    strided = replace(
        prepared, **{name: _restride(getattr(prepared, name), *pad) for name, pad in zip(names, pads, strict=True)}
    )
    expected = parity.evaluate(loss, prepared, 0.5, "blockwise")
    errors = parity.errors(parity.evaluate(loss, strided, 0.5, "blockwise"), expected)
    assert max(errors) < 1e-5


def _restride(x: Tensor, step: int, pad: int, columns_first: bool) -> Tensor:
    """Equal values; a step of `step` elements, and `pad` more per axis except the slowest."""
    strides, stride = [0] * x.ndim, step
    for axis in range(x.ndim) if columns_first else reversed(range(x.ndim)):
        strides[axis] = stride
        stride *= x.shape[axis] + pad
    room = x.new_full((stride + 1,), torch.nan if x.is_floating_point() else -99)
    return room.as_strided(x.shape, strides).copy_(x)


@each_backend
@each_loss
def test_strided_inputs(loss: str, backend: str, device: str) -> None:
    prepared = parity.prepare(loss, make_inputs(9, 70, 32), torch.float32, device)
    every_other = Inputs(
        **{field.name: getattr(prepared, field.name).repeat_interleave(2, dim=-1)[..., ::2] for field in fields(Inputs)}
    )
    transposed = replace(prepared, query=prepared.query.T.contiguous().T, queue=prepared.queue.T.contiguous().T)
    assert not every_other.queue.is_contiguous()
    assert not transposed.queue.is_contiguous()
    expected = parity.evaluate(loss, prepared, 0.2, backend)
    for strided in (every_other, transposed):
        errors = parity.errors(parity.evaluate(loss, strided, 0.2, backend), expected)
        assert max(errors) < 1e-6


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda x: str(x)[6:])
def test_mixco_with_the_keys_of_the_batch_in_16_bits(backend: str, device: str, dtype: torch.dtype) -> None:
    """As in training: with a bank of 16 bits the keys of the batch are rounded and the queries are not."""
    inputs = make_inputs(17, 70, 128)
    rounded = replace(inputs, key=inputs.key.to(dtype).double())
    prepared = parity.prepare("mixco", rounded, dtype, device)
    truth = parity.evaluate_truth("mixco", prepared, 0.2)
    in_16_bits = replace(prepared, key=prepared.key.to(dtype))
    assert torch.equal(in_16_bits.key.float(), prepared.key)
    errors = parity.errors(parity.evaluate("mixco", in_16_bits, 0.2, backend), truth)
    tolerated = parity.tolerances("mixco", dtype)
    assert errors.loss < tolerated.loss
    assert errors.gradient < tolerated.gradient
