"""The input path: sample plans, image sources, and executors that turn both into batches."""

from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError, UnreadableImages
from fastssl_pipelines.executors.base import Executor, available_executors, build_executor
from fastssl_pipelines.plan import (
    BatchPlan,
    SamplePlan,
    ViewPlan,
    partial_labels,
)
from fastssl_pipelines.sampler import EvaluationSampler, TrainSampler
from fastssl_pipelines.sources.base import ArraySource, Source
from fastssl_pipelines.sources.folder import ImageFolder, ListedImages
from fastssl_pipelines.sources.open import list_images, open_source
from fastssl_pipelines.sources.shards import TarShards
from fastssl_pipelines.views import ViewSpec

__all__ = [
    "ArraySource",
    "Batch",
    "BatchPlan",
    "DataError",
    "EvaluationSampler",
    "Executor",
    "ImageFolder",
    "ListedImages",
    "SamplePlan",
    "Source",
    "TarShards",
    "TrainSampler",
    "UnreadableImages",
    "ViewPlan",
    "ViewSpec",
    "available_executors",
    "build_executor",
    "list_images",
    "open_source",
    "partial_labels",
]
