"""Which backend runs: the user's choice, the environment variable, availability; never a silent fallback."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl_kernels import available_backends, info_nce, reference, use_backend
from fastssl_kernels.backend import requested
from fastssl_kernels.blockwise import losses as blockwise


def rows(count: int, features: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(count, features, generator=torch.Generator().manual_seed(count), dtype=dtype), dim=1)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that run, in order."""
    from fastssl_kernels.triton import losses

    names: list[str] = []

    def record(module: object, function: str, name: str) -> None:
        original = getattr(module, function)

        def wrapper(*arguments: object, **options: object) -> object:
            names.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, wrapper)

    record(blockwise, "info_nce_rows", "blockwise")
    record(losses, "info_nce_rows", "triton")
    record(reference, "_info_nce_rows", "reference")
    return names


def run() -> None:
    info_nce(rows(3), rows(3), rows(20), temperature=0.1)


no_interpreter = available_backends("cpu")["triton"]
interpreted = pytest.mark.skipif(no_interpreter is not None, reason=str(no_interpreter))


@interpreted
def test_each_name_runs_its_backend(ran: list[str]) -> None:
    for name in ("triton", "blockwise", "reference", "auto"):
        with use_backend(name):
            run()
    run()
    assert ran == ["triton", "blockwise", "reference", "blockwise", "blockwise"]


@interpreted
def test_environment_variable_is_the_default(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSSL_BACKEND", "triton")
    run()
    with use_backend("reference"):
        run()
    assert ran == ["triton", "reference"]


def test_context_is_left_after_an_error() -> None:
    before = requested()
    with pytest.raises(KeyError), use_backend("reference"), use_backend("blockwise"):
        raise KeyError
    assert requested() == before


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match='use_backend was given "cuda"; the backends are auto, triton'),
        use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("FASTSSL_BACKEND", "fast")
    with pytest.raises(ValueError, match='FASTSSL_BACKEND was given "fast"'):
        run()


def test_named_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    double = rows(3, dtype=torch.float64)
    wide = rows(3, features=513)
    with use_backend("triton"):
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="do not take float64"):
                info_nce(double, double, double, temperature=0.1)
            with pytest.raises(RuntimeError, match="at most 512 features and the rows have 513"):
                info_nce(wide, wide, wide, temperature=0.1)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(RuntimeError, match=r'"triton" was chosen, but .* only under TRITON_INTERPRET=1'):
            run()


def test_auto_accepts_float64_and_wide_rows() -> None:
    for x in (rows(3, dtype=torch.float64), rows(3, features=513)):
        assert info_nce(x, x, x, temperature=0.1).isfinite()


@interpreted
def test_available_backends_gives_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available_backends("cpu") == {"triton": None, "blockwise": None, "reference": None}
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in (available_backends("cpu")["triton"] or "")
    assert "on mps" in (available_backends("mps")["triton"] or "")
    if not torch.cuda.is_available():
        assert available_backends("cuda")["triton"] == "torch finds no CUDA device"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_on_a_gpu_runs_triton_and_agrees(dtype: torch.dtype, ran: list[str]) -> None:
    query, key, queue = rows(65, 128).cuda(), rows(65, 128).cuda(), rows(4096, 128).to("cuda", dtype)
    value = info_nce(query, key, queue, temperature=0.2)
    expected = reference.info_nce(query.double(), key.double(), queue.double(), temperature=0.2)
    assert ran[0] == "triton"
    assert abs(value.item() / expected.item() - 1) < (1e-6 if dtype == torch.float32 else 1e-3)
