"""What the losses promise beyond numbers: dtypes, constants, reductions, compilation, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl_kernels import info_nce, unicon, use_backend
from fastssl_kernels.losses import _info_nce, _unicon

BACKENDS = ("blockwise", "triton")


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def inputs(device: str = "cpu", rows: int = 9, entries: int = 70, features: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, key, queue = (
        F.normalize(torch.randn(size, features, generator=generator), dim=1).to(device)
        for size in (rows, rows, entries)
    )
    labels = torch.arange(max(rows, entries), device=device) % 4 - 1
    return {
        "query": query,
        "key": key,
        "queue": queue,
        "query_labels": labels[:rows],
        "queue_labels": labels[:entries],
    }


def call(loss: str, given: dict[str, Any], **options: Any) -> Any:
    names = {"query", "key", "queue"} | ({"query_labels", "queue_labels"} if loss == "unicon" else set())
    function: Callable[..., Any] = {"info_nce": info_nce, "unicon": unicon}[loss]
    return function(**{name: given[name] for name in names}, **{"temperature": 0.1, **options})


@pytest.fixture(params=["info_nce", "unicon"])
def loss(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with use_backend(request.param):
        yield request.param


def test_mean_is_the_mean_of_the_rows(loss: str, backend: str) -> None:
    given = inputs(device_of(backend))
    given["query"].requires_grad_()
    rows, row_accuracy = call(loss, given, reduction="none", return_accuracy=True)
    mean, accuracy = call(loss, given, return_accuracy=True)
    assert rows.shape == row_accuracy.shape == (9,)
    assert mean.shape == accuracy.shape == ()
    assert accuracy.dtype == torch.float32
    assert not accuracy.requires_grad
    torch.testing.assert_close(mean, rows.mean())
    torch.testing.assert_close(accuracy, row_accuracy.mean())
    torch.testing.assert_close(call(loss, given), mean)


def test_queue_may_be_overwritten_before_backward(loss: str, backend: str) -> None:
    given = inputs(device_of(backend))
    query = given["query"].requires_grad_()
    (expected,) = torch.autograd.grad(call(loss, given), query)
    value = call(loss, given)
    for name in ("queue", "key", "query_labels", "queue_labels"):
        given[name].zero_()
    (gradient,) = torch.autograd.grad(value, query)
    assert torch.equal(gradient, expected)


def test_strided_inputs(loss: str, backend: str) -> None:
    given = inputs(device_of(backend))
    strided = {name: x.repeat_interleave(2, dim=0)[::2] for name, x in given.items()}
    strided["query"] = given["query"].T.contiguous().T
    expected = call(loss, given)
    assert not strided["queue"].is_contiguous()
    torch.testing.assert_close(call(loss, strided), expected)
    strided["queue"] = given["queue"].T.contiguous().T
    torch.testing.assert_close(call(loss, strided), expected)


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_may_be_mixed(loss: str, backend: str, query_dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
    given = inputs(device_of(backend))
    given["query"] = given["query"].to(query_dtype).requires_grad_()
    given["queue"] = given["queue"].to(queue_dtype)
    value = call(loss, given, temperature=0.5)
    (gradient,) = torch.autograd.grad(value, given["query"])
    given = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    with use_backend("reference"):
        expected = call(loss, given, temperature=0.5)
    assert value.dtype == torch.float32
    assert gradient.dtype == query_dtype
    assert abs(value.item() / expected.item() - 1) < 1e-3


@pytest.mark.parametrize("name", ["reference", *BACKENDS])
def test_autocast_does_not_round(loss: str, name: str) -> None:
    given = inputs(device_of(name))
    with use_backend(name):
        expected = call(loss, given, reduction="none")
        with torch.autocast(device_of(name), dtype=torch.bfloat16):
            value = call(loss, given, reduction="none")
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
def test_compiles_as_one_graph_and_follows_the_backend(loss: str, graph: str) -> None:
    given = inputs()
    query = given["query"].requires_grad_()
    compiled = torch.compile(lambda: call(loss, given, return_accuracy=True), fullgraph=True, backend=graph)
    for name in ("blockwise", "reference"):
        with use_backend(name):
            value, accuracy = compiled()
            expected, expected_accuracy = call(loss, given, return_accuracy=True)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(accuracy, expected_accuracy)
        torch.testing.assert_close(
            torch.autograd.grad(value, query)[0],
            torch.autograd.grad(expected, query)[0],
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name: str) -> None:
    given = inputs(device_of(name))
    rows = (given["query"].requires_grad_(), given["key"], given["queue"])
    torch.library.opcheck(_info_nce, (*rows, 0.1, True, name))
    torch.library.opcheck(_unicon, (*rows, given["query_labels"], given["queue_labels"], 0.1, False, name))


def test_second_derivative_is_refused() -> None:
    given = inputs()
    query = given["query"].requires_grad_()
    (gradient,) = torch.autograd.grad(call("info_nce", given), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "vector": (lambda g: {"query": g["query"][0]}, ValueError, "query has shape"),
    "no rows": (lambda g: {"query": g["query"][:0]}, ValueError, "query has shape"),
    "no queue": (lambda g: {"queue": g["queue"][:0]}, ValueError, "queue has shape"),
    "key rows": (lambda g: {"key": g["key"][1:]}, ValueError, r"key has shape \[8, 32\]"),
    "columns": (lambda g: {"queue": g["queue"].T}, ValueError, r"it must be \[K, 32\]"),
    "integers": (lambda g: {"query": g["query"].long()}, TypeError, "query has dtype torch.int64"),
    "float64 mixed": (lambda g: {"queue": g["queue"].double()}, TypeError, "float64 does not mix"),
    "device": (lambda g: {"key": g["key"].to("meta")}, ValueError, "move them to one device"),
    "queue grad": (lambda g: {"queue": g["queue"].requires_grad_()}, ValueError, r"pass queue.detach\(\)"),
    "key grad": (lambda g: {"key": g["key"].requires_grad_()}, ValueError, r"pass key.detach\(\)"),
    "zero temperature": (lambda g: {"temperature": 0.0}, ValueError, "temperature is 0.0"),
    "negative temperature": (lambda g: {"temperature": -1.0}, ValueError, "temperature is -1.0"),
    "nan temperature": (lambda g: {"temperature": float("nan")}, ValueError, "temperature is nan"),
    "tensor temperature": (
        lambda g: {"temperature": torch.tensor(0.1)},
        TypeError,
        "temperature is a tensor",
    ),
    "reduction": (lambda g: {"reduction": "sum"}, ValueError, 'reduction is "sum"'),
}
REFUSED_LABELS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "dtype": (
        lambda g: {"query_labels": g["query_labels"].int()},
        TypeError,
        "query_labels has dtype torch.int32",
    ),
    "length": (lambda g: {"queue_labels": g["queue_labels"][1:]}, ValueError, r"it must be \[70\]"),
    "device": (
        lambda g: {"queue_labels": g["queue_labels"].to("meta")},
        ValueError,
        "queue_labels is on meta",
    ),
}


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_a_sentence(loss: str, name: str, case: str) -> None:
    change, kind, sentence = REFUSED[case]
    given = inputs()
    given |= {"temperature": 0.1, "reduction": "mean"} | change(given)
    with use_backend(name), pytest.raises(kind, match=sentence):
        call(loss, given, temperature=given["temperature"], reduction=given["reduction"])


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("case", REFUSED_LABELS)
def test_refuses_labels_with_a_sentence(name: str, case: str) -> None:
    change, kind, sentence = REFUSED_LABELS[case]
    given = inputs()
    with use_backend(name), pytest.raises(kind, match=sentence):
        call("unicon", given | change(given))


def test_debug_mode_refuses_rows_that_are_not_unit(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs()
    long = given | {"queue": given["queue"] * 1.5}
    call(loss, long)
    monkeypatch.setenv("FASTSSL_DEBUG", "1")
    call(loss, given)
    with pytest.raises(ValueError, match=r"queue has a row whose norm is off 1 by 0\.5"):
        call(loss, long)
