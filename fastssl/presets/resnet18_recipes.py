"""ResNet-18 recipes that CIFAR, STL-10 and Tiny ImageNet share."""

from __future__ import annotations

from typing import Any, TypeVar

from fastssl.config import Config, OptimConfig
from fastssl.methods import MethodConfig
from fastssl.methods.msvq import MSVQConfig
from fastssl.methods.queue_method import MomentumConfig
from fastssl.methods.ressl import ReSSLConfig
from fastssl.presets.data_sets import DataSet, configuration, strong_view, weak_view
from fastssl_pipelines.views import ViewSpec

_Momentum = TypeVar("_Momentum", bound=MomentumConfig)

RE_RUN = "pc-cp/Benchmark-Methods-For-MNN, a re-run by MSVQ's author"
BEST_EPOCH = "the published result is the best epoch of the linear evaluation"
MOCO_OF_MSVQ = (
    "the settings of that result are not in the repository: queue, momentum and head are MSVQ's own, temperature 0.2 "
    "and the loss in one direction are UNVERIFIED"
)


def notebook(on: DataSet, method: type[_Momentum], *, epochs: int = 200, **options: Any) -> Config:
    """MoCo's CIFAR-10 notebook: linear head, no blur, split batch norm, momentum 0.99."""
    view = ViewSpec(size=on.size, scale=(0.08, 1.0))
    optim = OptimConfig(lr=0.06, weight_decay=5e-4, schedule="cosine-epoch")
    settings = {"temperature": 0.1, "queue_size": 4096, "momentum": 0.99, "head": "linear", **options}
    return configuration(on, method(**settings), optim, view, view, epochs=epochs, batch_size=512)


def msvq_like(on: DataSet, method: MethodConfig, *views: ViewSpec) -> Config:
    """MSVQ's settings for every data set: split batch norm, five epochs of warm-up, cosine."""
    optim = OptimConfig(lr=0.06, weight_decay=5e-4, schedule="cosine", warmup_epochs=5)
    return configuration(on, method, optim, *views, epochs=200, batch_size=256)


def teacher_views(on: DataSet, teachers: int) -> tuple[ViewSpec, ...]:
    """A strong view for the student and one weak, mostly flipped view per teacher."""
    return (strong_view(on.size), *[weak_view(on.size, flip=0.9)] * teachers)


def queue_of(on: DataSet, method: type[_Momentum], **options: Any) -> _Momentum:
    """The method with the queue, momentum and head of MSVQ's author, who uses larger ones for 64 pixels than for 32."""
    queue_size, momentum = (4096, 0.99) if on.size == 32 else (16384, 0.996)
    return method(**{"queue_size": queue_size, "momentum": momentum, "hidden_dim": 2048, "dim": 128, **options})


def moco_of_msvq(on: DataSet, method: type[_Momentum], **options: Any) -> Config:
    """MoCo v2, or a method like it, as MSVQ's author trains it: two strong views, temperature 0.2."""
    view = strong_view(on.size)
    return msvq_like(on, queue_of(on, method, temperature=0.2, **options), view, view)


def msvq(on: DataSet, **options: Any) -> Config:
    """The official MSVQ command; second momentum and teacher temperature depend on the data set."""
    return msvq_like(on, queue_of(on, MSVQConfig, **options), *teacher_views(on, 3))


def ressl(on: DataSet) -> Config:
    """ReSSL as MSVQ's author trains it."""
    return msvq_like(on, queue_of(on, ReSSLConfig), *teacher_views(on, 1))
