"""The identity of a run: its options and images, compared across ranks and with every checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from fastssl.config import Config, OptimConfig, to_json
from fastssl.distributed import world_size
from fastssl.errors import ConfigError
from fastssl.models.queue import KeyQueue
from fastssl.schedule import learning_rate
from fastssl_pipelines.sources.base import Source

Facts = dict[str, Any]
"""Plain values by dotted name, for example {"optim.lr": 0.03, "images.count": 50000}."""

# The images themselves are compared, so their location may change.
_PATHS = ("data.root", "data.unlabeled", "data.label_list", "data.quarantine")
# May differ between machines: they change the speed but not the images.
_OF_A_MACHINE = (
    *_PATHS,
    "run.dir",
    "run.tensorboard",
    "data.download",
    "data.workers",
    "data.prefetch",
    "data.resident_gib",
    "data.decode",
)
HARMLESS = (
    *_OF_A_MACHINE,
    "preset",
    "data.pipeline",
    "method.shard_queue",
    "method.queue_dtype",  # Its resolved value, "machine.queue_dtype", is compared
    "train.device",
    "train.compile",
    "train.cuda_graph",
    "train.deterministic",
    "train.non_finite",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.timeout_s",
    "eval.every_epochs",
    "eval.k",
    "eval.temperature",
    "machine.device",
    "machine.dtype",
    "machine.torch",
    "test_images.count",
    "test_images.files",
    "test_images.labels",
    # Checked by `require_same_rates`
    "train.epochs",
    "train.steps",
    "length.steps",
)
"""Facts that may differ between a checkpoint and the run that resumes from it; differences are logged.

None changes what a step computes, except for the last bits on another device, pipeline or torch release, and for the
dtype that --train.precision auto chooses for the device.
"""
MEASURED = ("images", "known_labels", "test_images", "machine", "length")
"""Sections of the facts that are not options."""
_BEFORE = {"method.queue_dtype": "fp32", "machine.queue_dtype": "float32"}
"""Values for runs older than these facts."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_IN_WORDS = {
    "images.count": "the number of training images (--data.root)",
    "images.files": "the digest of the training images' names and sizes (--data.root)",
    "images.labels": "the digest of the training images' labels (--data.root)",
    "known_labels.count": "the number of labels that the method sees (--data.label-list, --data.label-fraction)",
    "known_labels.values": "the digest of the labels that the method sees (--data.label-list, --data.label-fraction)",
    "test_images.count": "the number of test images",
    "test_images.files": "the digest of the test images' names and sizes",
    "test_images.labels": "the digest of the test images' labels",
    "machine.device": "the device",
    "machine.dtype": "the dtype of products",
    "machine.queue_dtype": "the dtype of the queue (--method.queue-dtype, which config.json has as queue_dtype)",
    "machine.torch": "the release of torch",
    "length.steps": "the number of steps of the run",
}


def facts_of_options(config: Config) -> Facts:
    """Every option by its name on the command line, with the plain value that config.json holds."""
    facts: Facts = {}

    def add(values: Mapping[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict) and prefix == "" and "view" not in name:
                add(value, f"{name}.")
            else:
                facts[prefix + name] = value if not isinstance(value, list | dict) else json.dumps(value)

    options = json.loads(to_json(config))
    del options["format"]
    add(options, "")
    return facts


def facts_of_images(name: str, source: Source) -> Facts:
    """The count of a split's images, and digests (16 hexadecimal digits) of their names and sizes and their labels."""
    return {
        f"{name}.count": len(source),
        f"{name}.files": source.fingerprint(),
        f"{name}.labels": _digest(source.labels, *source.classes),
    }


def facts_of_known_labels(labels: NDArray[np.int64]) -> Facts:
    """The count and a digest of the labels that the method may see."""
    return {"known_labels.count": int((labels >= 0).sum()), "known_labels.values": _digest(labels)}


def facts_of_machine(device: torch.device, dtype: torch.dtype, queue_dtype: torch.dtype) -> Facts:
    """The device, the dtypes of products and queue, and the release of torch."""
    return {
        "machine.device": device.type,
        "machine.dtype": f"{dtype}".removeprefix("torch."),
        "machine.queue_dtype": f"{queue_dtype}".removeprefix("torch."),
        "machine.torch": str(torch.__version__),
    }


def digest(facts: Facts) -> str:
    """16 hexadecimal digits of a hash of the facts that must not differ."""
    return hashlib.sha256(json.dumps(binding(facts), sort_keys=True).encode()).hexdigest()[:16]


def require_equal_on_ranks(facts: Facts) -> None:
    """Raise ConfigError on all ranks if a fact differs that must not; all ranks must call it."""
    if world_size() == 1:
        return
    everyone: list[Facts] = [{}] * world_size()
    dist.all_gather_object(everyone, facts)
    for rank, facts_there in enumerate(everyone):
        for name, first, other in differing(everyone[0], facts_there):
            if name not in _OF_A_MACHINE:
                raise ConfigError(
                    f"{in_words(name)} is {other} on rank {rank} and {first} on rank 0; start all processes with the "
                    "same options and the same images"
                )


def binding(facts: Facts) -> Facts:
    """The facts that must not differ between a run and its checkpoints."""
    return {name: value for name, value in facts.items() if name not in HARMLESS}


def require_same_run(then: Facts, now: Facts, where: object) -> None:
    """Raise ConfigError if `now` is a different run from `then`, whose facts were read from `where`."""
    for name, before, after in differing(binding(_completed(then, now)), binding(now)):
        raise ConfigError(
            f"{in_words(name)} is {after} in this run and was {before} in the run that wrote {where}; restore the old "
            "value, or start a new run in another --run.dir"
        )


def require_same_options(then: Facts, config: Config, where: object) -> None:
    """As `require_same_run`, but images, device and length may differ."""
    options = {name: value for name, value in then.items() if name.partition(".")[0] not in MEASURED}
    require_same_run(options, facts_of_options(config), where)


def harmless_changes(then: Facts, now: Facts) -> Iterator[str]:
    """A sentence for each permitted difference between a run's last start and this one."""
    for name, before, after in differing(_completed(then, now), now):
        if name in HARMLESS:
            yield f"{in_words(name)} is {after} from here on and was {before} before"


def require_same_rates(
    optim: OptimConfig, *, completed_steps: int, then: int, now: int, steps_per_epoch: int, follows_length: bool = False
) -> None:
    """Raise ConfigError if a run of `now` steps cannot continue after `completed_steps` of a run of `then` steps.

    It can if the completed steps would have had the same learning rates: the "step" schedule allows another length, and
    the cosine does not. `follows_length`: whether the method itself depends on the length.
    """
    if completed_steps > now:
        raise ConfigError(
            f"the run has already completed {completed_steps} steps and now ends at step {now}; raise --train.steps or "
            "--train.epochs"
        )
    if then == now or not completed_steps:
        return

    def rate(step: int, total: int) -> float:
        return learning_rate(optim, step, total_steps=total, steps_per_epoch=steps_per_epoch)

    if follows_length or any(rate(step, then) != rate(step, now) for step in range(completed_steps)):
        raise ConfigError(
            f"the run was planned for {then} steps and has {now} now, which with --optim.schedule {optim.schedule} "
            f"would have changed the learning rates of the {completed_steps} completed steps; restore --train.steps "
            "and --train.epochs, or start a new run"
        )


@torch.no_grad()
def weights_hash(method: nn.Module) -> int:
    """A 64-bit hash of all weights and other state that must be equal on all ranks; waits for the device.

    Excludes queues, which have `queue_hash`, and the running statistics of batch norm, which differ by rank.
    """
    queues = {id(x) for module in method.modules() if isinstance(module, KeyQueue) for x in module.buffers()}
    buffers = [
        buffer
        for name, buffer in method.named_buffers()
        if id(buffer) not in queues and not name.endswith(("running_mean", "running_var"))
    ]
    tensors = [*method.parameters(), *buffers]
    sums = torch.stack([x.detach().view(_BITS[x.itemsize]).sum(dtype=torch.int64) for x in tensors])
    places = torch.arange(len(sums), device=sums.device) * 2 + 1
    return int((sums * places).sum())


def differing(then: Facts, now: Facts) -> Iterator[tuple[str, Any, Any]]:
    """The name and both values of every fact that differs, options first; None for a missing value."""
    for name in sorted(then.keys() | now.keys(), key=lambda name: (name.partition(".")[0] in MEASURED, name)):
        before, after = then.get(name), now.get(name)
        if before != after:
            yield name, before, after


def _completed(then: Facts, now: Facts) -> Facts:
    """`then`, with `_BEFORE` filling in facts of `now` that are newer than its run."""
    return {name: value for name, value in _BEFORE.items() if name in now} | then


def in_words(name: str) -> str:
    """The name of a fact for messages: an option as on the command line, anything else in words."""
    return _IN_WORDS.get(name) or "--" + name.replace("_", "-")


def _digest(values: NDArray[np.int64], *names: str) -> str:
    total = hashlib.sha256(np.ascontiguousarray(values, np.int64).tobytes())
    for name in names:
        total.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return total.hexdigest()[:16]
