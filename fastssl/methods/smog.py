"""SMoG, synchronous momentum grouping (Pang et al., arXiv 2207.06167)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.distributed import gather_rows, gather_rows_with_gradient
from fastssl.errors import ConfigError
from fastssl.methods.base import Method, MethodConfig, MethodOutput, TrainProgress, register_method
from fastssl.models.ema import ema_update_, momentum_copy
from fastssl.models.encoders import Encoder
from fastssl.models.heads import MLPBatchNormHead, ProjectionHead
from fastssl.models.kmeans import spherical_kmeans
from fastssl.models.queue import KeyQueue
from fastssl.validation import Count, Decay, Range, Rows, Share, Temperature, Width, require
from fastssl_kernels import bank_cross_entropy, nearest_entry, update_groups
from fastssl_pipelines.batch import Batch
from fastssl_pipelines.views import ViewSpec

BANKS = 2  # As in the official code: heads alternate between the projections of the first two crops


@dataclass(frozen=True, kw_only=True)
class SMoGConfig(MethodConfig):
    """Options of SMoG, with the defaults for ImageNet."""

    name: ClassVar[str] = "smog"
    paper: ClassVar[str] = "arXiv 2207.06167"
    whole_batch: ClassVar[bool] = True

    temperature: Temperature = 0.1
    groups: Rows = 3000
    """Groups of one head."""
    heads: Annotated[int, Range(least=1, most=1024)] = 3
    """Sets of groups; the loss is their mean."""
    group_momentum: Share = 0.99
    """Share of a group that survives a step at the end of the run; falls linearly from 1."""
    groups_gradient: bool = True
    """Let the gradient also reach the encoder through the groups, as the authors' README says; their code stops it."""
    reset_epochs: Count = 1
    """Epochs between k-means resets of the groups."""
    bank_size: Rows = 1281167
    """Number of latest images whose projections enter the k-means; at most those of an epoch do."""
    hidden_dim: Width = 2048
    """Hidden width of projector and predictor."""
    momentum: Decay = 0.999
    """Share of the momentum encoder that survives a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        enough = self.bank_size >= self.groups
        require(enough, "--method.bank-size", self.bank_size, f"at least --method.groups {self.groups}")
        self.check_room("bank-size", BANKS * self.bank_size)
        self.check_room("groups", self.heads * self.groups)

    def check_batch(self, batch_size: int) -> None:
        super().check_batch(batch_size)
        if self.bank_size < batch_size:
            raise ConfigError(
                f"--method.bank-size {self.bank_size} was given with --train.batch-size {batch_size}; "
                "the bank must hold at least one batch"
            )


@register_method
class SMoG(Method):
    """Classifies each crop's prediction among groups that move with the projections of the same step.

    Views 0 and 1 are the large crops of the trained encoder, views 2 and 3 those of the momentum encoder, whose nearest
    old groups are the targets; further views are small crops of the trained encoder. Groups move before the logits are
    computed. At the end of an epoch a spherical k-means of the latest projections replaces the groups, and the encoder
    replaces the momentum encoder. Before the first step, one epoch passes the encoder to fill the banks. Written from
    the official code and its README, as the paper's body could not be read. Unlike that code, batch norm sees one
    resolution at a time, as in SwAV, so the momentum encoder needs no small crops.
    """

    Config: ClassVar[type[MethodConfig]] = SMoGConfig
    follows_length = True  # The momentum of the groups falls over the run
    capturable = False  # The host decides when an epoch ends
    small_options: ClassVar = {"hidden_dim": 32}
    small_views = (16, 16, 16, 16, 8, 8, 8)
    variants: ClassVar = {"official": {"groups_gradient": False}}
    group_momentum: Tensor
    groups: Tensor

    def __init__(
        self,
        encoder: Encoder,
        config: SMoGConfig,
        views: tuple[ViewSpec, ...],
        bank_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(encoder, config, views, bank_dtype)
        self.config = config
        self.query_encoder = nn.Sequential(encoder, ProjectionHead(encoder.feature_dim, config.hidden_dim, config.dim))
        self.predictor = MLPBatchNormHead(config.dim, config.hidden_dim, config.dim)
        self.key_encoder = momentum_copy(self.query_encoder)
        self.banks = nn.ModuleList([KeyQueue(config.bank_size, config.dim, dtype=bank_dtype) for _ in range(BANKS)])
        self.register_buffer("groups", normalize(torch.randn(config.heads, config.groups, config.dim), dim=2))
        self.register_buffer("group_momentum", torch.ones(()))

    @classmethod
    def check_views(cls, views: tuple[ViewSpec, ...]) -> None:
        sizes = [view.size for view in views]
        if len(views) < 4 or len(set(sizes[:4])) > 1 or len(set(sizes[4:])) > 1:
            raise ConfigError(
                f"views of {sizes} pixels were given to smog, which takes four large ones of one size and any number "
                "of small ones of one size; change `views` of the preset"
            )

    def prepare(self, batches: Iterator[Batch]) -> None:
        """Fill the banks from one epoch and cluster them into the first groups."""
        filled = 0
        for batch in batches:
            with torch.no_grad():
                rows = normalize(self.query_encoder(torch.cat(batch.views[:BANKS])).float(), dim=1)
            self._enqueue(rows.chunk(BANKS), batch.step)
            filled += len(gather_rows(batch.ids))
        self._reset_groups(filled)

    def forward(self, batch: Batch) -> MethodOutput:
        large, targets_from, small = batch.views[:2], batch.views[2:4], batch.views[4:]
        projection = self.query_encoder(torch.cat(large))
        predictions = [self.predictor(projection)]
        if small:
            predictions.append(self.predictor(self.query_encoder(torch.cat(small))))
        prediction = normalize(torch.cat(predictions).float(), dim=1)
        rows = normalize(projection.float(), dim=1).chunk(BANKS)
        with torch.no_grad():
            key = normalize(self.key_encoder(torch.cat(targets_from)).float(), dim=1)
        losses, moved = [], []
        for head, old in enumerate(self.groups):
            bank = old.to(self.bank_dtype)
            target = nearest_entry(key, bank).unflatten(0, (2, -1)).repeat(1, len(large) + len(small))
            features = gather_rows_with_gradient(rows[head % BANKS])
            assignment = nearest_entry(features, bank)
            groups, _ = update_groups(features, old, momentum=self.group_momentum, assignment=assignment)
            moved.append(groups.detach())
            groups = groups if self.config.groups_gradient else groups.detach().to(self.bank_dtype)
            losses.append(bank_cross_entropy(prediction, groups, target, temperature=self.config.temperature))
        return MethodOutput(torch.stack(losses).mean(), {}, (torch.stack(moved), *(row.detach() for row in rows)))

    @torch.no_grad()
    def after_step(self, output: MethodOutput, progress: TrainProgress) -> None:
        moved, *rows = output.updates
        self.groups.copy_(moved)
        self._enqueue(rows, progress.step)
        ema_update_(self.key_encoder, self.query_encoder, self.config.momentum)
        if progress.ends_epoch and (progress.step + 1) // progress.steps_per_epoch % self.config.reset_epochs == 0:
            self._reset_groups(progress.steps_per_epoch * len(gather_rows(rows[0])))
            ema_update_(self.key_encoder, self.query_encoder, 0.0)
        completed = (progress.step + 1) / progress.total_steps
        self.group_momentum.fill_(1 - (1 - self.config.group_momentum) * completed)

    def encoder(self) -> nn.Module:
        return self.query_encoder[0]

    def _enqueue(self, rows: tuple[Tensor, ...] | list[Tensor], step: int | Tensor) -> None:
        for bank, projections in zip(self.banks, rows, strict=True):
            cast(KeyQueue, bank).enqueue(self.gather_keys(projections), None, step)

    def _reset_groups(self, images_per_epoch: int) -> None:
        """Cluster the banks, whose first `images_per_epoch` rows an epoch fills, into new groups."""
        for head in range(self.config.heads):
            rows = cast(KeyQueue, self.banks[head % BANKS]).keys[:images_per_epoch]
            self.groups[head] = spherical_kmeans(rows, self.config.groups)
