"""The launches of torch.compile stay within a budget, and split batch norm costs little more than local."""

from __future__ import annotations

import pytest

from tests.preflight.launches import of_encoder

# Each kind of block once: with and without a shortcut convolution, with stride 1 and 2. The other blocks repeat these.
BLOCKS = (2, 1, 0, 0)
# Triton kernels and library calls of one pass, (forward, backward), 256 images in bf16, measured with torch
# 2.14.1; another version may need fewer. `python -m tests.preflight.launches resnet50` prints those of all blocks.
BUDGET = {
    ("resnet18", 32, "local"): (55, 50),
    ("resnet18", 32, "split"): (68, 66),
    ("resnet50", 224, "local"): (83, 75),
    ("resnet50", 224, "split"): (100, 94),
}
ABOVE_LOCAL = 4 / 3
CONVOLUTIONS = {"resnet18": 8, "resnet50": 12}  # With the stem; each is at least a call of a library


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "size"), [("resnet18", 32), ("resnet50", 224)])
def test_launches_are_within_the_budget(encoder: str, size: int) -> None:
    counts = {}
    for norm in ("local", "split"):
        passes = of_encoder(encoder, size=size, norm=norm, blocks=BLOCKS)
        counts[norm] = passes["forward"].total, passes["backward"].total
        assert passes["forward"].library >= CONVOLUTIONS[encoder]
        assert passes["backward"].library >= CONVOLUTIONS[encoder]
    for norm, found in counts.items():
        assert all(one <= allowed for one, allowed in zip(found, BUDGET[encoder, size, norm], strict=True)), counts
    assert all(split <= ABOVE_LOCAL * local for split, local in zip(counts["split"], counts["local"], strict=True))
