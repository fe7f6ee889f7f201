"""A loss from outside the tree is registered in one place; parity and `fastssl verify` then treat it like ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastssl.cli import main
from fastssl.commands import verify
from fastssl_kernels import LOSSES, parity, register_loss, unregister_loss
from fastssl_kernels.parity import make_inputs
from fastssl_kernels.registered_losses import losses as ours

T = 0.2


def defined(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float, reduction: str) -> Tensor:
    """Decoupled InfoNCE (arXiv 2110.06848): the own key is not in the denominator."""
    own, logits = (query * key).sum(1) / temperature, query @ queue.to(query.dtype).T / temperature
    rows = logits.exp().sum(1).log() - own
    return rows if reduction == "none" else rows.mean()


def decoupled(query: Tensor, key: Tensor, queue: Tensor, *, temperature: float, reduction: str) -> Tensor:
    """The same in plain torch without overflow."""
    own, logits = (query * key).sum(1) / temperature, query @ queue.to(query.dtype).T / temperature
    rows = logits.logsumexp(1) - own
    return rows if reduction == "none" else rows.mean()


def with_wrong_gradient(query: Tensor, key: Tensor, queue: Tensor, **options: object) -> Tensor:
    """Right value, wrong gradient: that of the own key is missing."""
    wrong = (query * key).sum(1) / T
    return decoupled(query, key, queue, **options) + wrong - wrong.detach()  # type: ignore[arg-type]


@pytest.fixture
def registered() -> Iterator[Callable[..., str]]:
    """Register a loss as "decoupled" for one test."""

    def register(function: Callable[..., Tensor], **traits: object) -> str:
        register_loss("decoupled", function, defined, **traits)  # type: ignore[arg-type]
        return "decoupled"

    yield register
    if "decoupled" in LOSSES:
        unregister_loss("decoupled")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_plug_in_passes_parity(dtype: torch.dtype, registered: Callable[..., str]) -> None:
    name = registered(decoupled)
    given = parity.prepare(name, make_inputs(33, 127, 48), dtype)
    truth = parity.evaluate_truth(name, given, T)
    errors, allowed = parity.errors(parity.evaluate(name, given, T, "blockwise"), truth), parity.tolerances(name, dtype)
    assert errors.loss < allowed.loss
    assert errors.gradient < allowed.gradient


def test_a_wrong_gradient_fails_parity(registered: Callable[..., str]) -> None:
    name = registered(with_wrong_gradient)
    given = parity.prepare(name, make_inputs(33, 127, 48), torch.float32)
    truth = parity.evaluate_truth(name, given, T)
    errors = parity.errors(parity.evaluate(name, given, T, "blockwise"), truth)
    allowed = parity.tolerances(name, torch.float32)
    assert errors.loss < allowed.loss
    assert errors.gradient > 1000 * allowed.gradient


@pytest.mark.parametrize(("function", "code"), [(decoupled, 0), (with_wrong_gradient, 1)])
def test_verify_judges_a_plug_in(
    function: Callable[..., Tensor],
    code: int,
    registered: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "CPU_SHAPE", (17, 200, 128))
    registered(function)
    assert main(["verify", "decoupled", "--device", "cpu", "--dtype", "float32"]) == code
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("decoupled float32")]
    assert [(row[2], row[-1]) for row in rows] == [("blockwise", "FAIL" if code else "pass")]


def test_verify_says_which_backend_a_plug_in_lacks(
    registered: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "CPU_SHAPE", (17, 200, 128))
    monkeypatch.setattr(verify, "_backends", lambda _: ["triton", "blockwise"])
    registered(decoupled)
    assert main(["verify", "decoupled", "--device", "cpu", "--dtype", "float32"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "decoupled: triton skipped, because it is registered for blockwise only" in printed


def test_a_backend_that_a_loss_lacks_is_refused(registered: Callable[..., str]) -> None:
    name = registered(decoupled)
    with pytest.raises(ValueError, match="decoupled was evaluated on triton, but it is registered for blockwise only"):
        parity.evaluate(name, make_inputs(3, 5, 8), T, "triton")


def test_tolerances_of_a_plug_in_replace_the_common_ones(registered: Callable[..., str]) -> None:
    name = registered(decoupled, tolerances={torch.float32: (1e-4, 1e-3)})
    assert parity.tolerances(name, torch.float32) == (1e-4, 1e-3)
    assert parity.tolerances(name, torch.bfloat16) == parity.tolerances("info_nce", torch.bfloat16)


def test_a_name_is_registered_once(registered: Callable[..., str]) -> None:
    registered(decoupled)
    for name in ("decoupled", "info_nce"):
        with pytest.raises(ValueError, match=f'^a loss named "{name}" is registered already; register under another'):
            register_loss(name, decoupled, defined)
    assert LOSSES["info_nce"].function is ours.info_nce


@pytest.mark.parametrize(
    ("traits", "sentence"),
    [
        (
            {"gradients": ("prediction",)},
            r"^gradients of decoupled are \('prediction',\); they must be fields of Inputs",
        ),
        ({"gradients": ()}, r"^gradients of decoupled are \(\); they must be fields"),
        ({"backends": ("cuda",)}, r"^backends of decoupled are \('cuda',\); they must be some of triton, blockwise"),
    ],
)
def test_wrong_traits_are_refused(
    traits: dict[str, tuple[str, ...]], sentence: str, registered: Callable[..., str]
) -> None:
    with pytest.raises(ValueError, match=sentence):
        registered(decoupled, **traits)
    assert "decoupled" not in LOSSES


def test_an_unknown_name_cannot_be_unregistered() -> None:
    with pytest.raises(ValueError, match=r'^no loss is named "decoupled"; the registered ones are queue_read'):
        unregister_loss("decoupled")
