"""k-means on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.errors import ConfigError
from fastssl_kernels import assign_groups, update_groups


@torch.no_grad()
def spherical_kmeans(rows: Tensor, clusters: int, *, rounds: int = 10) -> Tensor:
    """Unit centres float32 [clusters, C] of unit rows [N, C], by cosine similarity, after a number of Lloyd rounds.

    Rows are compared with the centres in the rows' dtype and summed in float32. Centres start at random rows, drawn
    from torch's generator; one without rows stays where it is. This is the clustering of SMoG's and SwAV's official
    codes. ConfigError for fewer rows than clusters.
    """
    if len(rows) < clusters:
        raise ConfigError(
            f"{clusters} groups were asked for and there are {len(rows)} images to make them of; lower --method.groups"
        )
    centres = rows[torch.randperm(len(rows), device=rows.device)[:clusters]].float()
    for _ in range(rounds):
        assignment = assign_groups(rows, centres.to(rows.dtype))
        centres, _ = update_groups(rows, centres, momentum=0.0, assignment=assignment)
    return centres
