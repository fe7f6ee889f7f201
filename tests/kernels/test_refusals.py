"""Wrong types and values of every argument of every function: one sentence that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastssl_kernels as fk
from fastssl.commands.verify_augment import draw_parameters
from fastssl_kernels import contract, use_backend
from tests.kernels.test_augment import pictures

Arguments = Callable[..., dict[str, Any]]

FUNCTIONS = (
    *("queue_read", "info_nce", "unicon", "sup_con", "soft_cross_entropy", "consistency", "mixco", "unmix"),
    *("bank_cross_entropy", "nearest_entry", "update_groups", "mean_shift", "nt_xent"),
)
OPTIONS: dict[str, dict[str, Any]] = {
    **{key: {"reduction": "mean", "return_accuracy": False} for key in ("info_nce", "unicon", "sup_con")},
    **{key: {} for key in ("queue_read", "nearest_entry", "update_groups")},
    "consistency": {"reduction": "mean", "include_positive": False},
}
# Never valid, for any argument
NO_ARGUMENT: list[Any] = [[0.1, 0.2], {"a": 1}, (), b"0.1", object(), np.zeros((9, 32)), 1j, slice(3), torch.float32]
TENSORS: list[Callable[[Tensor], Any]] = [
    lambda x: None,
    lambda x: 0.1,
    lambda x: x.tolist(),
    lambda x: x.numpy(),
    lambda x: x.to_sparse(),
    lambda x: torch.nested.nested_tensor(list(x.flatten(0, -2) if x.ndim > 1 else [x, x])),
    lambda x: torch.nested.nested_tensor([x.reshape(-1, 1)] * 2, layout=torch.jagged),
    lambda x: x.to(torch.complex64),
    lambda x: x.bool(),
    lambda x: x.to(torch.int8),
    lambda x: x.to("meta"),
    lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda x: x.float().to_mkldnn() if torch.backends.mkldnn.is_available() else None,
    lambda x: x[None, None],
    lambda x: x[..., :0],
    lambda x: x.sum(),
]
FLOATING: list[Callable[[Tensor], Any]] = [
    lambda x: x.double(),
    lambda x: x.to(torch.int64),
    lambda x: x.to(torch.float8_e4m3fn),
]
NUMBERS: dict[str, list[Any]] = {
    "temperature": [
        *("0.1", True, False, None, np.bool_(True), Decimal("0.1"), torch.tensor(0.1), math.nan, math.inf),
        *(0, -0.1, 1e-300, 1e-6, 9e-4, 1001, 1e300, 10**400, np.float32(1e-9)),
    ],
    "weight": ["0.1", True, None, math.nan, -0.1, 1.1, 10**400, torch.tensor(True), torch.tensor(1)],
    "momentum": ["0.1", True, None, math.nan, -0.1, 1.1, 10**400, torch.tensor(1), torch.ones(9)],
    "k": ["5", True, 2.0, None, math.nan, 0, -1, 71, 10**400, torch.tensor(5), np.float64(5)],
    "reduction": ["sum", "", None, True, 0, torch.tensor(1)],
    "return_accuracy": ["yes", None, 1, 0.0, torch.tensor(True), np.bool_(True)],
    "include_positive": ["yes", None, 1, 0.0, torch.tensor(True), np.bool_(True)],
}
NUMBERS["teacher_temperature"] = NUMBERS["temperature"]

each_function = pytest.mark.parametrize("name", FUNCTIONS)
each_backend = pytest.mark.parametrize("backend", ["reference", "blockwise"])


def complete(name: str, arguments: Arguments) -> dict[str, Any]:
    return arguments(name) | OPTIONS.get(name, {"reduction": "mean"})


def wrong_values(name: str, argument: str, value: Any) -> list[Any]:
    if not isinstance(value, Tensor):
        return NO_ARGUMENT + NUMBERS[argument]
    wrong = [change(value) for change in TENSORS + (FLOATING if value.is_floating_point() else [])]
    if not value.is_floating_point():
        wrong += [value.int(), value.float()]
    if name == "nt_xent" and argument == "labels":
        return [x for x in NO_ARGUMENT + wrong if x is not None]  # None is valid: no labels
    return NO_ARGUMENT + wrong


def constants(name: str) -> list[str]:
    """The floating-point tensors that get no gradient."""
    return {
        "queue_read": ["bank"],
        "soft_cross_entropy": ["teacher", "queue"],
        "mixco": ["keys", "queue"],
        "unmix": ["first_key", "second_key", "queue"],
        "update_groups": ["groups"],
        "bank_cross_entropy": [],
        "nearest_entry": [],
        "nt_xent": [],
    }.get(name, ["key", "queue"])


@each_backend
@each_function
def test_every_wrong_argument_raises_a_sentence_that_names_it(name: str, backend: str, arguments: Arguments) -> None:
    given = complete(name, arguments)
    for argument, value in given.items():
        for wrong in wrong_values(name, argument, value):
            # If two tensors do not match, either may be named
            named = "|".join(given) if isinstance(wrong, Tensor) else argument
            with use_backend(backend), pytest.raises((TypeError, ValueError), match=f"^({named}) ") as caught:
                getattr(fk, name)(**given | {argument: wrong})
            sentence = str(caught.value)
            assert "\n" not in sentence, sentence
            assert "; " in sentence or ", but " in sentence, sentence


@each_backend
@each_function
def test_constants_that_require_grad_are_refused(name: str, backend: str, arguments: Arguments) -> None:
    given = complete(name, arguments)
    for argument in constants(name):
        leaf = given[argument].clone().requires_grad_()
        with use_backend(backend), pytest.raises(ValueError, match=rf"^{argument} requires grad, .* pass {argument}"):
            getattr(fk, name)(**given | {argument: leaf})
    for argument in {"weight", "momentum"} & set(given):
        leaf = torch.tensor(0.5, requires_grad=True)
        with use_backend(backend), pytest.raises(ValueError, match=f"^{argument} requires grad, "):
            getattr(fk, name)(**given | {argument: leaf})


@each_backend
@each_function
def test_an_index_outside_the_rows_is_refused(name: str, backend: str, arguments: Arguments) -> None:
    given = complete(name, arguments)
    for argument in {"first", "second", "target"} & set(given):
        if given[argument].is_floating_point():
            continue
        for wrong in (-1, -100, 70, 2**62):
            index = given[argument].clone()
            index[..., 4] = wrong
            with (
                use_backend(backend),
                pytest.raises(IndexError, match=f"^{argument} holds {wrong}; it must hold indices"),
            ):
                getattr(fk, name)(**given | {argument: index})


@each_backend
@each_function
def test_any_real_number_is_accepted(name: str, backend: str, arguments: Arguments) -> None:
    given = complete(name, arguments)
    for argument in {"temperature", "teacher_temperature", "weight", "momentum"} & set(given):
        with use_backend(backend):
            results = [
                getattr(fk, name)(**given | {argument: number})
                for number in (0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), Fraction(1, 2))
            ]
        firsts = [result[0] if isinstance(result, tuple) else result for result in results]
        assert all(torch.equal(first, firsts[0]) for first in firsts)
    if "k" in given:
        with use_backend(backend):
            assert torch.equal(fk.mean_shift(**given | {"k": np.int64(5)}), fk.mean_shift(**given))


@pytest.mark.parametrize("temperature", contract.TEMPERATURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blockwise", "triton"])
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("nearest_entry", "update_groups")])
def test_losses_and_gradients_are_finite_at_the_extreme_temperatures(
    name: str, backend: str, dtype: torch.dtype, temperature: float, device: str, arguments: Arguments
) -> None:
    if backend == "triton" and dtype == torch.float64:
        return
    given = arguments(name, device)
    given |= {key: x.to(dtype) for key, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
    given |= {key: temperature for key in given if key.endswith("temperature")}
    lead = next(iter(given))
    given[lead].requires_grad_()
    with use_backend(backend):
        result = getattr(fk, name)(**given)
    loss = torch.cat([x.flatten() for x in result]).mean() if isinstance(result, tuple) else result
    (gradient,) = torch.autograd.grad(loss, given[lead])
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_augment_refuses_wrong_types() -> None:
    images, parameters = pictures(3), draw_parameters(3)
    for wrong in [*NO_ARGUMENT, None, 1, images.to_sparse(), images.float(), torch.nested.nested_tensor([images])]:
        with pytest.raises((TypeError, ValueError), match=r"^images "):
            fk.augment(wrong, parameters, out_dtype=torch.float32)
    for wrong in [*NO_ARGUMENT, None, 1]:
        with pytest.raises(TypeError, match=r"^parameters of type"):
            fk.augment(images, wrong, out_dtype=torch.float32)
    for wrong in [None, 1, "float32", np.float32, torch.float64, torch.int8]:
        with pytest.raises(TypeError, match=r"^out_dtype "):
            fk.augment(images, parameters, out_dtype=wrong)


@pytest.mark.parametrize("field", ["flip", "brightness", "hue", "order", "blur_sigma", "solarize"])
def test_augment_refuses_wrong_parameters(field: str) -> None:
    images, parameters = pictures(3), draw_parameters(3)
    value = getattr(parameters, field)
    others = [1, value.to_sparse(), value[:2], value.to("meta"), value.to(torch.complex64)]
    for wrong in NO_ARGUMENT + others + ([] if field == "blur_sigma" else [None]):
        with pytest.raises((TypeError, ValueError), match=rf"^parameters\.{field} "):
            fk.augment(images, replace(parameters, **{field: wrong}), out_dtype=torch.float32)
    for name in ("mean", "std"):
        for wrong in (None, 1.0, "abc", ("a", "b", "c"), (1.0, 1.0), (1.0, 1.0, math.nan), (1.0, math.inf, 1.0)):
            with pytest.raises((TypeError, ValueError), match=f"^{name} "):
                replace(parameters, **{name: wrong})
