"""The losses as torch ops: compilation, autocast, fake tensors, what backward needs and refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl_kernels import groups, ops, parity, use_backend
from fastssl_kernels.parity import Inputs, make_inputs

each_loss = pytest.mark.parametrize("loss", parity.LOSSES)
each_backend = pytest.mark.parametrize("backend", ["blockwise", "triton"])


def prepare(loss: str, device: str = "cpu") -> Inputs:
    return parity.prepare(loss, make_inputs(9, 70, 32), torch.float32, device)


def total(loss: str, given: Inputs) -> Tensor:
    return sum((x**3).sum() for x in parity.LOSSES[loss].call(given, 0.1))


@pytest.mark.parametrize("loss", [name for name in parity.LOSSES if name != "queue_read"])
@each_backend
def test_constants_may_be_overwritten_before_backward(loss: str, backend: str, device: str) -> None:
    given = prepare(loss, device)
    given.query.requires_grad_()
    with use_backend(backend):
        (expected,) = torch.autograd.grad(total(loss, given), given.query)
        value = total(loss, given)
        for name in ("key", "second_key", "queue", "query_labels", "queue_labels", "target", "partner", "weight"):
            getattr(given, name).zero_()
        (gradient,) = torch.autograd.grad(value, given.query)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("loss", ["queue_read", "bank_cross_entropy"])
@each_backend
def test_a_bank_that_is_read_again_must_not_be_overwritten(loss: str, backend: str, device: str) -> None:
    given = prepare(loss, device)
    given.query.requires_grad_()
    given.queue.requires_grad_(loss == "bank_cross_entropy")
    with use_backend(backend):
        value = total(loss, given)
        with torch.no_grad():
            given.queue.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@each_loss
def test_second_derivative_is_refused(loss: str) -> None:
    if loss == "update_groups":
        pytest.skip("its backward is plain torch")
    given = prepare(loss)
    given.query.requires_grad_()
    with use_backend("blockwise"):
        (gradient,) = torch.autograd.grad(total(loss, given), given.query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
@each_loss
def test_autocast_changes_nothing(loss: str, backend: str, device: str) -> None:
    given = prepare(loss, device)
    given.query.requires_grad_()
    with use_backend(backend):
        expected = total(loss, given)
        with torch.autocast(device, dtype=torch.bfloat16):
            value = total(loss, given)
        assert torch.equal(value, expected)
        assert torch.equal(*(torch.autograd.grad(x, given.query)[0] for x in (value, expected)))


@each_loss
def test_compiles_as_one_graph(loss: str) -> None:
    given = prepare(loss)
    leaves = [getattr(given, name).requires_grad_() for name in parity.LOSSES[loss].gradients]
    torch.compiler.reset()  # Code of the other losses counts as recompilation
    compiled = torch.compile(lambda: total(loss, given), fullgraph=True, backend="aot_eager")
    with use_backend("blockwise"):
        value, expected = compiled(), total(loss, given)
        gradients, wanted = torch.autograd.grad(value, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(value, expected)
    for gradient, of_eager in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, of_eager, rtol=1e-5, atol=1e-6)


def test_compiled_code_follows_the_backend() -> None:
    given = prepare("info_nce")
    compiled = torch.compile(lambda: total("info_nce", given), fullgraph=True, backend="eager")
    for backend in ("blockwise", "reference"):
        with use_backend(backend):
            assert torch.equal(compiled(), total("info_nce", given))


@each_loss
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(loss: str) -> None:
    given = prepare(loss)
    call = parity.LOSSES[loss].call
    with use_backend("blockwise"):
        real = call(given, 0.1)
        with FakeTensorMode() as mode:
            faked = call(Inputs(**{name: mode.from_tensor(x) for name, x in vars(given).items()}), 0.1)
    for result, expected in zip(faked, real, strict=True):
        assert (result.shape, result.dtype) == (expected.shape, expected.dtype)


def _op_arguments(given: Inputs, backend: str) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every op with arguments; if it has a backward, the first is a float32 query that requires grad."""
    query = given.query.clone().requires_grad_()
    pair = (query, given.key, given.queue)
    labels = (given.query_labels, given.queue_labels)
    own, row = torch.arange(9, device=query.device), torch.rand(9, device=query.device)
    rows = torch.cat([given.query, given.key]).requires_grad_()
    bank = given.queue.clone().requires_grad_()
    numbers = torch.arange(70, device=query.device)
    return [
        (ops.info_nce, (*pair, 0.1, True, backend)),
        (ops.unicon, (*pair, *labels, 0.1, False, backend)),
        (ops.sup_con, (*pair, *labels, 0.1, True, backend)),
        (ops.soft_cross_entropy, (query, given.key[None], given.queue, 0.1, 0.05, backend)),
        (ops.consistency, (*pair, 0.1, True, backend)),
        (ops.mixco, (*pair, own, given.partner, given.weight, 0.1, backend)),
        (ops.unmix, (query, given.key, given.second_key, given.queue, given.weight, 0.1, backend)),
        (ops.mean_shift, (*pair, 5, backend)),
        (ops.bank_cross_entropy, (query, bank, given.target, 0.1, backend)),
        (ops.nt_xent, (rows, own.repeat(2), 0.1, backend)),
        (ops.bank_gradient, (given.query, given.queue, given.target, numbers, 5 + row, row, row, 0.1, False, backend)),
        (ops.queue_read, (query, given.queue, 0.1, backend)),
        (ops.queue_read_gradient, (given.query, given.queue, row, given.key, 0.1, backend)),
        (ops.nearest, (given.query, given.queue, 3, backend)),
        (groups._group_sums, (query, own % 3, 70)),
    ]


@pytest.mark.parametrize("index", range(15))
@each_backend
def test_opcheck(backend: str, device: str, index: int) -> None:
    op, arguments = _op_arguments(prepare("info_nce", device), backend)[index]
    torch.library.opcheck(op, arguments)


def test_every_op_is_checked() -> None:
    checked = {op for op, _ in _op_arguments(prepare("info_nce"), "blockwise")}
    assert checked >= {x for x in vars(ops).values() if isinstance(x, torch.library.CustomOpDef)}
