"""Values and gradients of info_nce and unicon on every backend against the float64 reference."""

from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl_kernels import info_nce, reference, unicon, use_backend

LOSSES = ("info_nce", "unicon")
BACKENDS = ("blockwise", "triton")
TEMPERATURES = (0.01, 0.05, 0.07, 0.2, 1.0)
SHAPES = ((1, 1, 32), (7, 5, 5), (33, 127, 48), (65, 300, 128), (7, 300, 64), (33, 1, 128), (1, 127, 32))
# One entry at 0.01: the loss, about 1, is the difference of two logits near 60, held by float32 to 4e-6.
FLOAT32_CASES = [(shape, t) for shape in SHAPES for t in TEMPERATURES if (shape[1], t) != (1, 0.01)]
# Rounding the query to bfloat16 moves a logit by up to 0.004 / temperature; many features average that away.
CASES_OF_16_BITS = [((7, 5, 32), 0.2), ((33, 127, 48), 0.2), *(((65, 300, 128), t) for t in (0.07, 0.2, 1.0))]
# Relative Frobenius errors of loss rows and gradient rows, by the queue's dtype; the reference is given the
# same rounded queue.
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (1e-3, 2e-3),
    torch.float16: (1e-3, 2e-3),
}


@dataclass
class Case:
    """Queue entries lie about as near to their query as its key does, so that no loss is tiny."""

    query: Tensor
    key: Tensor
    queue: Tensor
    query_labels: Tensor
    queue_labels: Tensor

    def to(self, rows: torch.dtype, queue: torch.dtype, device: str = "cpu") -> "Case":
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        moved |= {
            "query": moved["query"].to(rows),
            "key": moved["key"].to(rows),
            "queue": moved["queue"].to(queue),
        }
        return Case(**moved)


def make_case(rows: int, entries: int, features: int, seed: int = 0) -> Case:
    """A float64 case with three classes and a third of all labels unknown."""
    generator = torch.Generator().manual_seed(seed)

    def near(x: Tensor, distance: float) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return F.normalize(x + distance * F.normalize(noise, dim=1), dim=1)

    def hide(labels: Tensor) -> Tensor:
        return labels.masked_fill(torch.rand(len(labels), generator=generator) < 1 / 3, -1)

    query = near(torch.zeros(rows, features, dtype=torch.float64), 1.0)
    source = torch.arange(entries) % rows
    labels = torch.arange(rows) % 3
    return Case(
        query,
        near(query, 1.5),
        near(query[source], 1.3),
        hide(labels),
        hide((labels[source] + source // 3) % 3),
    )


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def evaluate(loss: str, backend: str, case: Case, temperature: float, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss rows, gradient of their sum weighted by `weights`, accuracy rows."""
    functions = {"info_nce": info_nce, "unicon": unicon}
    labels = {"query_labels": case.query_labels, "queue_labels": case.queue_labels} if loss == "unicon" else {}
    query = case.query.clone().requires_grad_()
    with use_backend(backend):
        rows, accuracy = functions[loss](
            query,
            case.key,
            case.queue,
            **labels,
            temperature=temperature,
            reduction="none",
            return_accuracy=True,
        )
    (gradient,) = torch.autograd.grad((rows * weights.to(rows)).sum(), query)
    return rows.detach(), gradient, accuracy


def error(given: Tensor, expected: Tensor) -> float:
    """Relative Frobenius norm of the difference; where zeros are expected, the norm itself."""
    assert given.shape == expected.shape
    expected = expected.double().cpu()
    norm = expected.norm().item()
    return (given.double().cpu() - expected).norm().item() / (norm if norm > 0 else 1.0)


def assert_matches(loss: str, backend: str, case: Case, queue_dtype: torch.dtype, temperature: float) -> None:
    """Float32 query and key (float64 with a float64 queue) against the reference in float64."""
    rows_dtype = torch.float64 if queue_dtype == torch.float64 else torch.float32
    given = case.to(rows_dtype, queue_dtype, device_of(backend))
    weights = torch.linspace(-1, 2, len(case.query), dtype=torch.float64)
    rows, gradient, _ = evaluate(loss, backend, given, temperature, weights.to(device_of(backend)))
    truth = given.to(torch.float64, torch.float64)
    expected_rows, expected_gradient, _ = evaluate(loss, "reference", truth, temperature, weights)
    loss_tolerance, gradient_tolerance = TOLERANCES[queue_dtype]
    assert rows.dtype == rows_dtype
    assert gradient.dtype == rows_dtype
    assert error(rows, expected_rows) < loss_tolerance
    assert error(gradient, expected_gradient) < gradient_tolerance


@pytest.mark.parametrize(("shape", "temperature"), FLOAT32_CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float32(loss: str, backend: str, shape: tuple[int, int, int], temperature: float) -> None:
    assert_matches(loss, backend, make_case(*shape), torch.float32, temperature)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_float64(loss: str, shape: tuple[int, int, int], temperature: float) -> None:
    assert_matches(loss, "blockwise", make_case(*shape), torch.float64, temperature)


@pytest.mark.parametrize(("shape", "temperature"), CASES_OF_16_BITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_queue_of_16_bits(
    loss: str, backend: str, dtype: torch.dtype, shape: tuple[int, int, int], temperature: float
) -> None:
    assert_matches(loss, backend, make_case(*shape), dtype, temperature)


@pytest.mark.parametrize("loss", LOSSES)
def test_blockwise_takes_several_blocks_of_rows_and_of_the_queue(loss: str) -> None:
    assert_matches(loss, "blockwise", make_case(300, 9000, 16), torch.float64, 0.01)


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("loss", LOSSES)
def test_triton_splits_the_queue(loss: str, temperature: float) -> None:
    from fastssl_kernels.triton.launch import make_plan

    plan = make_plan(9, 1001, 32, torch.float32, labelled=False, temperature=temperature, accuracy=True, processors=16)
    assert plan.splits > 2
    assert_matches(loss, "triton", make_case(9, 1001, 32), torch.float32, temperature)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(1, 20), entries=st.integers(1, 90), features=st.integers(2, 70), seed=st.integers(0, 99))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_any_shape(loss: str, backend: str, rows: int, entries: int, features: int, seed: int) -> None:
    assert_matches(loss, backend, make_case(rows, entries, features, seed), torch.float32, 0.2)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_unicon_is_the_sum_over_all_pairs(temperature: float) -> None:
    case = make_case(6, 20, 8)
    logits = torch.cat([(case.query * case.key).sum(1, keepdim=True), case.query @ case.queue.T], 1) / temperature
    expected = []
    for i, label in enumerate(case.query_labels.tolist()):
        match = [True] + [label != -1 and other == label for other in case.queue_labels.tolist()]
        positives = [value for value, same in zip(logits[i].tolist(), match, strict=True) if same]
        negatives = [value for value, same in zip(logits[i].tolist(), match, strict=True) if not same]
        pairs = torch.tensor([n - p for n in negatives for p in positives], dtype=torch.float64)
        expected.append(torch.log(1 + pairs.exp().sum()))
    for backend in ("reference", "blockwise"):
        rows, _, _ = evaluate("unicon", backend, case, temperature, torch.ones(6))
        assert error(rows, torch.stack(expected)) < 1e-12


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("labels", ["all unknown", "no match"])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_unicon_without_matches_is_info_nce(backend: str, labels: str, temperature: float) -> None:
    dtype = torch.float64 if backend == "reference" else torch.float32
    case = make_case(33, 127, 48).to(dtype, dtype, device_of(backend))
    if labels == "all unknown":
        case.query_labels.fill_(-1)
        case.queue_labels.fill_(-1)
    else:
        case.query_labels.add_(100)
    weights = torch.linspace(-1, 2, 33)
    first = evaluate("unicon", backend, case, temperature, weights)
    second = evaluate("info_nce", backend, case, temperature, weights)
    for result, expected in zip(first, second, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_unicon_row_without_negatives_has_zero_loss_and_gradient(backend: str, temperature: float) -> None:
    case = make_case(7, 40, 32).to(torch.float32, torch.float32, device_of(backend))
    case.queue_labels.fill_(5)
    case.query_labels.copy_(torch.tensor([5, 5, -1, 2, 5, -1, 5]))
    rows, gradient, _ = evaluate("unicon", backend, case, temperature, torch.ones(7))
    without = case.query_labels == 5
    assert (rows[without] == 0).all()
    assert (gradient[without] == 0).all()
    assert (rows[~without] > 0).all()
    assert gradient[~without].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unicon_ignores_the_order_of_the_queue(backend: str) -> None:
    case = make_case(9, 127, 32).to(torch.float32, torch.float32, device_of(backend))
    order = torch.randperm(127, generator=torch.Generator().manual_seed(1))
    shuffled = Case(case.query, case.key, case.queue[order], case.query_labels, case.queue_labels[order])
    first = evaluate("unicon", backend, case, 0.07, torch.ones(9))
    second = evaluate("unicon", backend, shuffled, 0.07, torch.ones(9))
    assert error(first[0], second[0]) < 1e-6
    assert error(first[1], second[1]) < 1e-5


@pytest.mark.parametrize("temperature", [0.01, 0.07])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cosine", [1, -1])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_collapsed_queue(loss: str, backend: str, cosine: int, dtype: torch.dtype, temperature: float) -> None:
    """All of the queue equal to the key, or opposite to it: at 0.01 exp(1 / temperature) is not a float32.

    A logit is as exact as the rounding of the query, scaled by log2(e) / temperature, to the queue's dtype;
    with equal components all round the same way, which is the worst case.
    """
    entries = 130
    vector = F.normalize(torch.ones(1, 16, dtype=torch.float64), dim=1)  # 1/4 each: exact in any dtype
    labels = torch.arange(entries) % 2
    query = vector.expand(4, 16)
    case = Case(query, query, cosine * vector.expand(entries, 16), torch.tensor([0, 1, -1, 2]), labels)
    rows, gradient, _ = evaluate(
        loss, backend, case.to(torch.float32, dtype, device_of(backend)), temperature, torch.ones(4)
    )
    expected, expected_gradient, _ = evaluate(loss, "reference", case, temperature, torch.ones(4))
    assert gradient.isfinite().all()
    # Aligned, own key and queue agree and the gradient vanishes; its terms have norm 1 / temperature.
    assert (gradient.cpu() - expected_gradient).norm() < 1e-5 / temperature
    torch.testing.assert_close(rows.double().cpu(), expected, rtol=1e-6, atol=torch.finfo(dtype).eps / temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_accuracy_counts_rows_whose_own_key_is_nearest(loss: str, backend: str) -> None:
    case = make_case(65, 65, 32)
    own = (case.query * case.key).sum(1)
    expected = (own > (case.query @ case.queue.T).amax(1)).float()
    assert 0 < expected.sum() < 65
    given = case.to(torch.float32, torch.float32, device_of(backend))
    _, _, accuracy = evaluate(loss, backend, given, 0.07, torch.ones(65))
    assert torch.equal(accuracy.cpu(), expected)
    assert torch.equal(evaluate(loss, "reference", case, 0.07, torch.ones(65))[2], expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str) -> None:
    case = make_case(5, 11, 6)
    labels = {"query_labels": case.query_labels, "queue_labels": case.queue_labels} if loss == "unicon" else {}
    function = {"info_nce": info_nce, "unicon": unicon}[loss]

    def rows(query: Tensor) -> Tensor:
        return function(query, case.key, case.queue, **labels, temperature=0.2, reduction="none")

    with use_backend("blockwise"):
        assert torch.autograd.gradcheck(rows, case.query.clone().requires_grad_())


@pytest.mark.parametrize("loss", LOSSES)
def test_reference_shares_the_signature(loss: str) -> None:
    case = make_case(5, 11, 6)
    labels = {"query_labels": case.query_labels, "queue_labels": case.queue_labels} if loss == "unicon" else {}
    rows = getattr(reference, loss)(case.query, case.key, case.queue, **labels, temperature=0.2, reduction="none")
    mean = getattr(reference, loss)(case.query, case.key, case.queue, **labels, temperature=0.2)
    torch.testing.assert_close(rows.mean(), mean)
