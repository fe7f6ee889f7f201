"""Partitioning of the Triton reads: splits fill a GPU, cover the bank and change no result."""

import itertools

import pytest
import torch

from fastssl_kernels import parity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESSORS = (108, 132, 148)  # Of an A100, an H100 and a B200
ROWS = (64, 128, 256, 384, 512, 1024, 1568, 2048, 4096, 8192)
ENTRIES = (4096, 16384, 65536, 100_000, 131_072, 262_144)


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("features", [128, 256, 512])
@pytest.mark.parametrize("labeled", [False, True])
def test_triton_splits_keep_a_gpu_busy(labeled: bool, features: int, processors: int) -> None:
    from fastssl_kernels.triton.launch import TILES, choose_splits, wave_efficiency

    tiles = TILES[labeled, 2][features]
    for rows, entries in itertools.product(ROWS, ENTRIES):
        blocks, count = -(-rows // tiles.rows), -(-entries // tiles.entries)
        splits = choose_splits(blocks, count, processors)
        if blocks * count >= 8 * processors:  # With less no partition fills a GPU: programs need a few tiles each
            assert wave_efficiency(blocks, count, splits, processors) >= 0.85, (rows, entries, splits)


def test_triton_wave_efficiency_counts_idle_processors() -> None:
    from fastssl_kernels.triton.launch import wave_efficiency

    assert wave_efficiency(row_blocks=132, tiles=10, splits=1, processors=132) == 1
    assert wave_efficiency(row_blocks=133, tiles=10, splits=1, processors=132) == 133 / 264
    # Ten tiles in four splits make three per program and one in the last
    assert wave_efficiency(row_blocks=1, tiles=10, splits=4, processors=4) == 10 / 12


@pytest.mark.parametrize("rows", [1, 200, 4096])
@pytest.mark.parametrize("entries", [1, 63, 4097, 65536])
def test_triton_shares_cover_the_bank_once(rows: int, entries: int) -> None:
    from fastssl_kernels.triton.launch import TILES, make_plan

    plan = make_plan(rows, entries, 128, torch.bfloat16, TILES[False, 2], temperature=0.2, processors=132)
    assert plan.split_length % plan.tiles.entries == 0
    assert (plan.splits - 1) * plan.split_length < entries <= plan.splits * plan.split_length


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.01, 0.2])
@pytest.mark.parametrize("loss", ["info_nce", "unicon", "sup_con", "soft_cross_entropy", "mixco", "consistency"])
def test_triton_result_does_not_depend_on_the_splits(
    loss: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastssl_kernels.triton import launch

    given = parity.make_inputs(9, 333, 32).to(torch.float32, torch.float32, DEVICE)
    truth = parity.evaluate(loss, given.to(torch.float64, torch.float64), temperature, "reference")
    for splits in (1, 2, 5, 11):
        monkeypatch.setattr(launch, "choose_splits", lambda *_, wanted=splits: wanted)
        error = parity.errors(parity.evaluate(loss, given, temperature, "triton"), truth)
        assert error.loss < 2e-6
        assert error.gradient < (5e-5 if loss == "consistency" else 1e-5)
