"""k-means on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.errors import ConfigError
from fastssl_kernels import nearest_entry, update_groups


@torch.no_grad()
def spherical_kmeans(rows: Tensor, clusters: int, *, rounds: int = 10) -> Tensor:
    """Cluster unit rows [N, C] by cosine similarity into unit centers float32 [clusters, C], in Lloyd rounds.

    Rows are compared with the centers in the rows' dtype and summed in float32. Centers start at random rows, drawn
    from torch's generator; a center without rows stays unchanged. This is the clustering of SMoG's and SwAV's official
    code. ConfigError for fewer rows than clusters.
    """
    if len(rows) < clusters:
        raise ConfigError(
            f"{clusters} groups were asked for and there are {len(rows)} images to cluster; lower --method.groups"
        )
    centers = rows[torch.randperm(len(rows), device=rows.device)[:clusters]].float()
    for _ in range(rounds):
        assignment = nearest_entry(rows, centers.to(rows.dtype))
        centers, _ = update_groups(rows, centers, momentum=0.0, assignment=assignment)
    return centers
