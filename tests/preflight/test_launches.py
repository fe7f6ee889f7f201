"""The launches of torch.compile stay within a budget, and split batch norm costs little more than local."""

from __future__ import annotations

import pytest

from tests.preflight.launches import of_encoder

# Triton kernels and library calls of one pass, (forward, backward), 256 images in bf16, measured with torch
# 2.14.1; another version may need fewer. `python -m tests.preflight.launches resnet50` prints them.
BUDGET = {
    ("resnet18", 32, "local"): (127, 119),
    ("resnet18", 32, "split"): (162, 157),
    ("resnet50", 224, "local"): (352, 323),
    ("resnet50", 224, "split"): (424, 419),
}
ABOVE_LOCAL = 4 / 3


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "size"), [("resnet18", 32), ("resnet50", 224)])
def test_launches_are_within_the_budget(encoder: str, size: int) -> None:
    counts = {}
    for norm in ("local", "split"):
        passes = of_encoder(encoder, size=size, norm=norm)
        counts[norm] = passes["forward"].total, passes["backward"].total
        assert passes["forward"].library >= 20  # At least one per convolution
        assert passes["backward"].library >= 20
    for norm, found in counts.items():
        assert all(one <= allowed for one, allowed in zip(found, BUDGET[encoder, size, norm], strict=True)), counts
    assert all(split <= ABOVE_LOCAL * local for split, local in zip(counts["split"], counts["local"], strict=True))
