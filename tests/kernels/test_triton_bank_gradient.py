"""The Triton kernel for the gradient to a bank, against its formula in float64."""

import pytest
import torch
from torch import Tensor

from fastssl_kernels import parity, reference

SHAPES = {  # Rows, entries, features, targets
    "one": (1, 3, 5, 1),
    "fewer entries than a tile": (9, 20, 16, 2),
    "tails": (70, 150, 48, 1),
    "whole tiles": (64, 128, 64, 2),
    "splits of rows": (530, 40, 16, 1),
    "over 128 features": (33, 70, 130, 2),
    "wide": (20, 50, 512, 1),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-3}


def gradient(*arguments: object) -> Tensor:
    from fastssl_kernels.triton.bank_gradient import bank_gradient

    return bank_gradient(*arguments)


def truth(
    rows: Tensor,
    bank: Tensor,
    row_labels: Tensor,
    bank_labels: Tensor,
    lse: Tensor,
    label_weight: Tensor,
    upstream: Tensor,
    temperature: float,
    skip_own: bool,
) -> Tensor:
    rows, bank, lse, label_weight, upstream = (x.double() for x in (rows, bank, lse, label_weight, upstream))
    weight = (rows @ bank.T / temperature - lse[:, None]).exp()
    weight -= label_weight[:, None] * (row_labels[:, :, None] == bank_labels).sum(0)
    if skip_own:
        weight.fill_diagonal_(0)
    return (weight * upstream[:, None]).T @ rows / temperature


def error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def group_arguments(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    bank_dtype: torch.dtype | None = None,
    temperature: float = 0.1,
    scale: float = 1.0,
) -> tuple:
    """Called as in the backward of `bank_cross_entropy`, with upstream gradients of about `scale`."""
    rows, entries, features, targets = shape
    given = parity.make_inputs(rows, entries, features).to(dtype, bank_dtype or dtype)
    lse = (given.query.double() @ given.queue.double().T / temperature).logsumexp(1).float()
    upstream = scale * torch.randn(rows, generator=torch.Generator().manual_seed(3))
    label_weight = torch.full((rows,), 1 / targets)
    labels = given.target[:targets], torch.arange(entries)
    return given.query, given.queue, *labels, lse, label_weight, upstream, temperature, False


def batch_arguments(rows: int, features: int, dtype: torch.dtype, temperature: float) -> tuple:
    """Called as in the backward of `nt_xent` with labels."""
    batch = parity.make_inputs(rows, 1, features).query.to(dtype)
    labels = torch.arange(rows) // 2
    logits = batch.double() @ batch.double().T / temperature
    lse = logits.fill_diagonal_(-torch.inf).logsumexp(1).float()
    upstream = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    return batch, batch, labels[None], labels, lse, torch.ones(rows), upstream, temperature, True


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_triton_bank_gradient_is_the_formula(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    arguments = group_arguments(shape, dtype)
    result = gradient(*arguments)
    assert result.dtype == torch.float32
    assert error(result, truth(*arguments)) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("rows", [2, 150])
def test_triton_bank_gradient_without_the_own_row(rows: int, dtype: torch.dtype) -> None:
    arguments = batch_arguments(rows, 48, dtype, temperature=0.1)
    expected = truth(*arguments)
    if rows == 2:  # The only other row is the positive, with a softmax of 1
        assert gradient(*arguments).norm() < TOLERANCES[dtype] / 0.1
    else:
        assert error(gradient(*arguments), expected) < TOLERANCES[dtype]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_triton_bank_gradient_where_the_own_logit_overflows() -> None:
    arguments = batch_arguments(70, 16, torch.float32, temperature=0.004)
    own = torch.exp2((arguments[0].square().sum(1) / 0.004 - arguments[4]) * 1.4427)
    assert own.isinf().any()
    # Logits of 250 have errors of 1e-5 themselves
    assert error(gradient(*arguments), truth(*arguments)) < 1e-4


def test_triton_bank_gradient_is_that_of_autograd() -> None:
    arguments = group_arguments((40, 70, 48, 2), torch.float32)
    prediction, groups, target, _, _, _, upstream, temperature, _ = arguments
    leaf = groups.double().requires_grad_()
    loss = reference.bank_cross_entropy(prediction.double(), leaf, target, temperature=temperature, reduction="none")
    (expected,) = torch.autograd.grad(loss, leaf, upstream.double())
    assert error(gradient(*arguments), expected) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "bank_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), DTYPES[1:]]
)
def test_triton_bank_gradient_of_two_dtypes_is_computed_in_float32(dtype: torch.dtype, bank_dtype: torch.dtype) -> None:
    arguments = group_arguments((40, 70, 48, 2), dtype, bank_dtype)
    assert error(gradient(*arguments), truth(*arguments)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("scale", [1e-9, 65536.0])
def test_triton_bank_gradient_of_scaled_losses(scale: float, dtype: torch.dtype) -> None:
    arguments = group_arguments((40, 70, 48, 1), dtype, scale=scale)
    assert error(gradient(*arguments), truth(*arguments)) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
def test_triton_bank_gradient_of_a_constant_is_zero(dtype: torch.dtype) -> None:
    arguments = group_arguments((40, 70, 48, 1), dtype, scale=0.0)
    assert torch.equal(gradient(*arguments), torch.zeros(70, 48))


def test_triton_bank_gradient_accepts_any_strides() -> None:
    rows, bank, row_labels, bank_labels, *rest = arguments = group_arguments((40, 70, 48, 2), torch.float32)
    wide = torch.cat([bank, bank], 1)
    strided = rows.T.contiguous().T, wide[:, :48], row_labels.T.contiguous().T, bank_labels, *rest
    assert torch.equal(gradient(*strided), gradient(*arguments))
    label_weight = torch.tensor(0.5).expand(40)
    strided = rows, bank.T.contiguous().T, row_labels, bank_labels, rest[0], label_weight, *rest[2:]
    assert torch.equal(gradient(*strided), gradient(*arguments))
