"""The contract of the losses beyond values: reductions, accuracy, dtypes and error messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastssl_kernels as fk
from fastssl_kernels import parity, use_backend

Arguments = Callable[..., dict[str, Any]]

FUNCTIONS = list(dict.fromkeys(name.partition("+")[0] for name in parity.LOSSES))
REDUCED = [name for name in FUNCTIONS if name not in ("queue_read", "update_groups")]
WITH_ACCURACY = ["info_nce", "unicon", "sup_con"]
WITH_QUEUE = [name for name in REDUCED if name not in ("bank_cross_entropy", "nt_xent")]
DTYPES = [  # Of queries and queue: exact, as in training, reversed, equal
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]

each_backend = pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])


@each_backend
@pytest.mark.parametrize("loss", REDUCED)
def test_mean_is_the_mean_of_the_rows(loss: str, backend: str, device: str, arguments: Arguments) -> None:
    with use_backend(backend):
        rows = getattr(fk, loss)(**arguments(loss, device), reduction="none")
        mean = getattr(fk, loss)(**arguments(loss, device))
    assert rows.shape == (18 if loss == "nt_xent" else 9,)
    assert rows.dtype == mean.dtype == torch.float32
    torch.testing.assert_close(mean, rows.mean())


@each_backend
@pytest.mark.parametrize("loss", WITH_ACCURACY)
def test_accuracy_counts_rows_whose_own_key_is_nearest(
    loss: str, backend: str, device: str, arguments: Arguments
) -> None:
    given = arguments(loss, device)
    near = torch.arange(9, device=device)[:, None] % 2
    given["key"] = F.normalize(given["key"] + 2 * near * given["query"], dim=1)
    own = (given["query"] * given["key"]).sum(1)
    expected = (own > (given["query"] @ given["queue"].T).amax(1)).float()
    assert 0 < expected.sum() < 9
    given["query"].requires_grad_()
    with use_backend(backend):
        rows, row_accuracy = getattr(fk, loss)(**given, reduction="none", return_accuracy=True)
        mean, accuracy = getattr(fk, loss)(**given, return_accuracy=True)
        without = getattr(fk, loss)(**given)
    assert torch.equal(row_accuracy, expected)
    assert not accuracy.requires_grad
    torch.testing.assert_close(accuracy, expected.mean())
    torch.testing.assert_close(mean, rows.mean())
    torch.testing.assert_close(without, mean)


@pytest.mark.parametrize(("query_dtype", "queue_dtype"), DTYPES, ids=str)
@each_backend
@pytest.mark.parametrize("loss", WITH_QUEUE)
def test_dtypes_may_be_mixed(
    loss: str,
    backend: str,
    device: str,
    arguments: Arguments,
    query_dtype: torch.dtype,
    queue_dtype: torch.dtype,
) -> None:
    given = arguments(loss, device)
    given["query"] = given["query"].to(query_dtype).requires_grad_()
    given["queue"] = given["queue"].to(queue_dtype)
    with use_backend(backend):
        value = getattr(fk, loss)(**given)
    (gradient,) = torch.autograd.grad(value, given["query"])
    with use_backend("reference"):
        expected = getattr(fk, loss)(**{name: _double(x) for name, x in given.items()})
    assert value.dtype == torch.float32
    assert gradient.dtype == query_dtype
    assert abs(value.item() / expected.item() - 1) < (2e-5 if queue_dtype == torch.float32 else 4e-3)


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


Change = Callable[[dict[str, Any]], dict[str, Any]]
Refusal = tuple[str, Change, type[Exception], str]

# For every function with an argument of this name
REFUSED_EVERYWHERE: list[Refusal] = [
    ("query", lambda g: {"query": g["query"][0]}, ValueError, "query has shape"),
    ("query", lambda g: {"query": g["query"][:0]}, ValueError, "query has shape"),
    ("query", lambda g: {"query": g["query"].long()}, TypeError, "query has dtype torch.int64"),
    ("queue", lambda g: {"queue": g["queue"][:0]}, ValueError, "queue has shape"),
    ("queue", lambda g: {"queue": g["queue"].T}, ValueError, r"it must be \[K, 32\]"),
    ("queue", lambda g: {"queue": g["queue"].double()}, TypeError, "float64 does not mix"),
    ("queue", lambda g: {"queue": g["queue"].to("meta")}, ValueError, "move them to one device"),
    ("queue", lambda g: {"queue": g["queue"].requires_grad_()}, ValueError, r"pass queue.detach\(\)"),
    ("key", lambda g: {"key": g["key"][1:]}, ValueError, r"key has shape \[8, 32\]"),
    ("key", lambda g: {"key": g["key"].to("meta")}, ValueError, "key is on meta"),
    ("key", lambda g: {"key": g["key"].requires_grad_()}, ValueError, r"pass key.detach\(\)"),
    ("query_labels", lambda g: {"query_labels": g["query_labels"].int()}, TypeError, "has dtype torch.int32"),
    ("query_labels", lambda g: {"query_labels": g["query_labels"].to("meta")}, ValueError, "query_labels is on meta"),
    ("queue_labels", lambda g: {"queue_labels": g["queue_labels"][1:]}, ValueError, r"it must be \[70\]"),
    ("weight", lambda g: {"weight": 1.5}, ValueError, "weight is 1.5; it must lie in"),
    ("weight", lambda g: {"weight": torch.rand(8)}, ValueError, r"weight has shape \[8\]; it must be \[\] or \[9\]"),
    ("weight", lambda g: {"weight": torch.rand(9, device="meta")}, ValueError, "weight is on meta"),
    ("weight", lambda g: {"weight": torch.rand(9, requires_grad=True)}, ValueError, r"pass weight.detach\(\)"),
    ("temperature", lambda g: {"temperature": 0.0}, ValueError, "temperature is 0.0"),
    ("temperature", lambda g: {"temperature": -1.0}, ValueError, "temperature is -1.0"),
    ("temperature", lambda g: {"temperature": float("nan")}, ValueError, "temperature is nan"),
    ("temperature", lambda g: {"temperature": float("inf")}, ValueError, "temperature is inf"),
    ("temperature", lambda g: {"temperature": torch.tensor(0.1)}, TypeError, "temperature is a tensor"),
]  # fmt: skip
REFUSED_HERE: list[Refusal] = [
    ("soft_cross_entropy", lambda g: {"teacher": g["teacher"][1:]}, ValueError, r"teacher has shape \[8, 32\]"),
    ("soft_cross_entropy", lambda g: {"teacher": torch.rand(2, 8, 32)}, ValueError, "one more dimension in front"),
    ("soft_cross_entropy", lambda g: {"teacher": torch.rand(0, 9, 32)}, ValueError, "one more dimension in front"),
    ("soft_cross_entropy", lambda g: {"teacher_temperature": 0.0}, ValueError, "teacher_temperature is 0.0"),
    ("mixco", lambda g: {"keys": g["keys"][:, 1:]}, ValueError, r"keys has shape \[9, 31\]"),
    ("mixco", lambda g: {"first": g["first"][1:]}, ValueError, r"first has shape \[8\]; it must be \[9\]"),
    ("mixco", lambda g: {"second": g["second"].int()}, TypeError, "second has dtype torch.int32"),
    ("unmix", lambda g: {"second_key": g["second_key"][1:]}, ValueError, r"second_key has shape \[8, 32\]"),
    ("bank_cross_entropy", lambda g: {"target": g["target"].int()}, TypeError, "target has dtype torch.int32"),
    ("bank_cross_entropy", lambda g: {"target": g["target"].T}, ValueError, r"it must be \[9\] or \[T, 9\]"),
    ("bank_cross_entropy", lambda g: {"bank": g["bank"].T}, ValueError, r"bank has shape \[32, 70\]"),
    ("update_groups", lambda g: {"momentum": 1.1}, ValueError, "momentum is 1.1; it must lie in"),
    ("update_groups", lambda g: {"groups": g["groups"].requires_grad_()}, ValueError, r"pass groups.detach\(\)"),
    ("mean_shift", lambda g: {"k": 0}, ValueError, "k is 0; it must lie between 1 and the queue's 70 entries"),
    ("mean_shift", lambda g: {"k": 71}, ValueError, "k is 71"),
    ("nt_xent", lambda g: {"second": g["second"][1:]}, ValueError, r"second has shape \[8, 32\]"),
    ("nt_xent", lambda g: {"second": g["second"].half()}, ValueError, "dtype torch.float16; it must have those"),
    ("nt_xent", lambda g: {"labels": g["labels"][1:]}, ValueError, r"labels has shape \[8\]"),
    ("queue_read", lambda g: {"bank": g["bank"].requires_grad_()}, ValueError, r"pass bank.detach\(\)"),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("loss", FUNCTIONS)
def test_refuses_bad_arguments_with_a_sentence(loss: str, backend: str, arguments: Arguments) -> None:
    cases = [case for case in REFUSED_EVERYWHERE if case[0] in arguments(loss)]
    for _, change, kind, sentence in cases + [case for case in REFUSED_HERE if case[0] == loss]:
        given = arguments(loss)
        with use_backend(backend), pytest.raises(kind, match=sentence):
            getattr(fk, loss)(**given | change(given))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("loss", REDUCED)
def test_refuses_an_unknown_reduction(loss: str, backend: str, arguments: Arguments) -> None:
    with use_backend(backend), pytest.raises(ValueError, match='reduction is "sum"; it must be "mean" or "none"'):
        getattr(fk, loss)(**arguments(loss), reduction="sum")


@pytest.mark.parametrize("loss", ["mixco", "bank_cross_entropy"])
def test_refuses_an_invalid_index_on_a_cpu(loss: str, arguments: Arguments) -> None:
    name = "second" if loss == "mixco" else "target"
    given = arguments(loss)
    given[name] = given[name].clone().fill_(70)
    with use_backend("blockwise"), pytest.raises(IndexError):
        getattr(fk, loss)(**given)


@pytest.mark.parametrize("loss", [name for name in FUNCTIONS if name != "update_groups"])
def test_debug_mode_refuses_rows_that_are_not_unit(
    loss: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(loss)
    name = {"queue_read": "bank", "bank_cross_entropy": "bank", "nt_xent": "second"}.get(loss, "queue")
    long = given | {name: given[name] * 1.5}
    getattr(fk, loss)(**long)
    monkeypatch.setenv("FASTSSL_DEBUG", "1")
    getattr(fk, loss)(**given)
    with pytest.raises(ValueError, match=r"has a row whose norm is off 1 by 0\.5"):
        getattr(fk, loss)(**long)
