"""The input path: plans of samples, sources of images and the executors that turn both into batches."""

from fastssl_pipelines.batch import Batch
from fastssl_pipelines.errors import DataError
from fastssl_pipelines.executor import Executor, available_executors, build_executor
from fastssl_pipelines.plan import (
    BatchPlan,
    EvaluationSteps,
    SamplePlan,
    TrainingSteps,
    ViewPlan,
    partial_labels,
)
from fastssl_pipelines.sources import ArraySource, ImageFolder, Source
from fastssl_pipelines.views import ViewSpec

__all__ = [
    "ArraySource",
    "Batch",
    "BatchPlan",
    "DataError",
    "EvaluationSteps",
    "Executor",
    "ImageFolder",
    "SamplePlan",
    "Source",
    "TrainingSteps",
    "ViewPlan",
    "ViewSpec",
    "available_executors",
    "build_executor",
    "partial_labels",
]
