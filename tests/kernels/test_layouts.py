"""Every tensor argument of every public function in every layout, against the reference in float64.

Rows and gradients do not depend on the memory layout of the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastssl_kernels as fk
from fastssl.commands.verify_augment import draw_parameters
from fastssl_kernels import AugmentParameters, use_backend
from tests.kernels import layouts
from tests.kernels.test_augment import pictures

Arguments = Callable[..., dict[str, Any]]

# Function -> its tensors that get a gradient, then all others
TENSORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "queue_read": (("query",), ("bank",)),
    "info_nce": (("query",), ("key", "queue")),
    "unicon": (("query",), ("key", "queue", "query_labels", "queue_labels")),
    "sup_con": (("query",), ("key", "queue", "query_labels", "queue_labels")),
    "soft_cross_entropy": (("query",), ("teacher", "queue")),
    "consistency": (("query",), ("key", "queue")),
    "mixco": (("query",), ("keys", "queue", "first", "second", "weight")),
    "unmix": (("query",), ("first_key", "second_key", "queue", "weight")),
    "bank_cross_entropy": (("prediction", "bank"), ("target",)),
    "nearest_entry": ((), ("query", "bank")),
    "update_groups": (("features",), ("groups",)),
    "mean_shift": (("query",), ("key", "queue")),
    "nt_xent": (("first", "second"), ("labels",)),
}
CASES = [(name, argument) for name, (leaves, others) in TENSORS.items() for argument in (*leaves, *others)]
LIMITS = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-6, 5e-5)}  # Of values and gradients, relative

each_argument = pytest.mark.parametrize(("name", "argument"), CASES)
each_backend = pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])


def each_layout(*more: str) -> pytest.MarkDecorator:
    """All layouts on the torch backends; only one on the interpreter, which is slow."""
    cases = [(backend, name) for backend in ("reference", "blockwise") for name in (*layouts.SAME_VALUES, *more)]
    return pytest.mark.parametrize(("backend", "layout"), [*cases, ("triton", (*more, "column_major")[0])])


def prepared(name: str, arguments: Arguments, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments with a tensor wherever a function accepts one; two teachers, two targets."""
    given = arguments(name, device)
    if "teacher" in given:
        given["teacher"] = torch.stack([given["teacher"], given["teacher"].flip(0)])
    if "weight" in given:
        given["weight"] = torch.linspace(0.1, 0.9, len(given["query"]), device=device)
    options = {} if name in ("queue_read", "nearest_entry", "update_groups") else {"reduction": "none"}
    floating = {key: x.to(dtype) for key, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return given | floating | options


def evaluate(name: str, given: dict[str, Any], upstream: Callable[[Tensor], Tensor] = torch.Tensor.contiguous) -> Any:
    """Values and gradients, each as one float64 vector; upstream gradients have the layout of `upstream`."""
    leaves = [given[leaf].detach().requires_grad_() for leaf in TENSORS[name][0]]
    outputs = getattr(fk, name)(**given | dict(zip(TENSORS[name][0], leaves, strict=True)))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = torch.cat([x.detach().double().flatten() for x in outputs])
    if not leaves:
        return values, values
    generator = torch.Generator().manual_seed(3)
    grown = [x for x in outputs if x.requires_grad]
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in grown]
    gradients = torch.autograd.grad(grown, leaves, [upstream(weight) for weight in weights])
    return values, torch.cat([x.double().flatten() for x in gradients])


def assert_right(name: str, given: dict[str, Any], backend: str, **options: Any) -> None:
    """Compare with the reference on the same values, contiguous and in float64."""
    double = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in given.items()}
    plain = {key: x.contiguous() if isinstance(x, Tensor) else x for key, x in double.items()}
    with use_backend("reference"):
        expected = evaluate(name, plain, **options)
    with use_backend(backend):
        found = evaluate(name, given, **options)
    dtype = next(x.dtype for x in given.values() if isinstance(x, Tensor) and x.is_floating_point())
    for got, wanted, limit in zip(found, expected, LIMITS[dtype], strict=True):
        # With equal or single rows a loss may be 0: its error is then that of the logits, whose scale is 10
        assert (got - wanted).norm() <= limit * wanted.norm().clamp_min(2)


def dtypes(backend: str) -> Iterator[torch.dtype]:
    yield torch.float32
    if backend != "triton":
        yield torch.float64


@each_backend
@each_argument
def test_layouts_of_each_argument(name: str, argument: str, backend: str, device: str, arguments: Arguments) -> None:
    for dtype in dtypes(backend):
        given = prepared(name, arguments, device, dtype)
        for layout in ("column_major",) if backend == "triton" else layouts.SAME_VALUES:
            strided = layouts.SAME_VALUES[layout](given[argument])
            assert torch.equal(strided, given[argument])
            assert strided.ndim == 1 or layout in ("column_major", "sliced") or not strided.is_contiguous()
            assert_right(name, given | {argument: strided}, backend)


@each_backend
@each_argument
def test_expanded_rows_of_each_argument(
    name: str, argument: str, backend: str, device: str, arguments: Arguments
) -> None:
    for dtype in dtypes(backend):
        given = prepared(name, arguments, device, dtype)
        if name in ("bank_cross_entropy", "nearest_entry", "update_groups") and argument in ("bank", "groups"):
            # All entries tie and the first must win, which needs exact products
            rows = next(iter(TENSORS[name][0] + TENSORS[name][1]))
            given[rows], given[argument] = layouts.coarse(given[rows]), layouts.coarse(given[argument])
        given[argument] = layouts.expanded(given[argument])
        assert given[argument].stride(0) == 0
        assert_right(name, given, backend)


@each_layout("lone")
@pytest.mark.parametrize("name", TENSORS)
def test_one_row_in_every_layout(name: str, layout: str, backend: str, device: str, arguments: Arguments) -> None:
    """All arguments at once, with axes of size 1, whose strides are arbitrary."""
    change = layouts.lone if layout == "lone" else layouts.SAME_VALUES[layout]
    for dtype in dtypes(backend):
        given = prepared(name, arguments, device, dtype)
        for argument in (*TENSORS[name][0], *TENSORS[name][1]):
            x = given[argument]
            of_rows = argument in ("teacher", "target")  # Their rows are the second axis
            x = x[:, :1] if of_rows else x[:1]
            x = x.clamp(max=0) if argument in ("first", "second", "target") and not x.is_floating_point() else x
            given[argument] = change(x[:1] if layout == "lone" else x)
        if name == "mean_shift":
            given["k"] = 1
        assert_right(name, given, backend)


UPSTREAM = {**layouts.SAME_VALUES, "expanded": layouts.expanded}


@each_layout("expanded")
@pytest.mark.parametrize("name", [name for name, (leaves, _) in TENSORS.items() if leaves])
def test_gradients_arrive_in_every_layout(
    name: str, layout: str, backend: str, device: str, arguments: Arguments
) -> None:
    for dtype in dtypes(backend):
        given = prepared(name, arguments, device, dtype)
        assert_right(name, given, backend, upstream=UPSTREAM[layout])


@pytest.mark.parametrize("name", ["info_nce", "unmix"])
@pytest.mark.parametrize("shape", [(64, 4096, 128), (1, 4096, 128), (300, 1000, 48)], ids=str)
def test_attention_takes_a_column_major_query(name: str, shape: tuple[int, int, int]) -> None:
    """Shapes split over threads and heads; once a source of garbage gradients up to 1e37."""
    from fastssl_kernels import parity

    given = parity.make_inputs(*shape).to(torch.float32, torch.float32)
    truth = parity.evaluate_truth(name, given, 0.2)
    for change in layouts.SAME_VALUES.values():
        given.query = change(given.query)
        errors = parity.errors(parity.evaluate(name, given, 0.2, "blockwise"), truth)
        assert max(errors) < 1e-5


ROUNDED = {torch.float16: 1e-2, torch.bfloat16: 6e-2}  # Of a value or gradient, if an argument is rounded


@each_backend
@each_argument
def test_dtypes_of_each_argument(name: str, argument: str, backend: str, device: str, arguments: Arguments) -> None:
    """One argument in 16 bits, the others in float32, against the reference on the same rounded values."""
    given = prepared(name, arguments, device, torch.float32)
    if not given[argument].is_floating_point():
        return
    for dtype, limit in ROUNDED.items():
        # Both views of a batch have the same dtype
        names = ("first", "second") if name == "nt_xent" else (argument,)
        mixed = given | {key: given[key].to(dtype) for key in names}
        with use_backend("reference"):
            expected = evaluate(name, {k: x.double() if _floats(x) else x for k, x in mixed.items()})
        with use_backend(backend):
            found = evaluate(name, mixed)
        if name in ("nearest_entry", "update_groups", "mean_shift"):  # Rounding may choose another entry
            assert found[0].isfinite().all()
            continue
        for got, wanted in zip(found, expected, strict=True):
            assert (got - wanted).norm() <= limit * wanted.norm()


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize("backend", ["blockwise", "triton"])
@pytest.mark.parametrize("layout", layouts.SAME_VALUES)
def test_layouts_of_augment(layout: str, backend: str, device: str) -> None:
    """Images and every parameter in one layout at once."""
    images, parameters = pictures(5, 9, 12), draw_parameters(5)
    change = layouts.SAME_VALUES[layout]
    names = [key for key in AugmentParameters.__slots__ if key not in ("mean", "std")]
    moved = {key: getattr(parameters, key).to(device) for key in names}
    with use_backend(backend):
        expected = fk.augment(images.to(device), replace(parameters, **moved), out_dtype=torch.float32)
        wide = _uint8(change, images)
        strided = {key: _bools(change, x) if x.dtype == torch.bool else change(x) for key, x in moved.items()}
        found = fk.augment(wide.to(device), replace(parameters, **strided), out_dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def _uint8(change: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """As int8, which has the bytes of uint8 and can hold the poison -99."""
    return change(images.view(torch.int8)).view(torch.uint8)


def _bools(change: Callable[[Tensor], Tensor], switch: Tensor) -> Tensor:
    return change(switch.view(torch.int8)).view(torch.bool)
