"""What makes a run the run that it is: its options and its images, compared among ranks and with every checkpoint."""

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
"""Plain values by dotted name, such as {"optim.lr": 0.03, "images.count": 50000}."""

# The images that these lead to are compared themselves, so they may lie elsewhere.
_PATHS = ("data.root", "data.unlabeled", "data.label_list", "data.quarantine")
# What a machine may have of its own: the same images come out, at another speed.
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
    "method.queue_dtype",  # "machine.queue_dtype", which it asks for, is compared
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
    # their rule is `require_same_rates`
    "train.epochs",
    "train.steps",
    "length.steps",
)
"""What may differ between a checkpoint and the run that goes on from it; a difference is told.

Nothing here changes what a step computes, but for the last bits of another device, pipeline or release of torch and
for the dtype that --train.precision auto takes from the device.
"""
MEASURED = ("images", "known_labels", "test_images", "machine", "length")
"""Sections of the facts that are no options."""
_BEFORE = {"method.queue_dtype": "fp32", "machine.queue_dtype": "float32"}
"""What runs did from before there were these facts."""
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
    """Number, names and sizes, and labels of the images of a split; digests are 16 hexadecimal digits."""
    return {
        f"{name}.count": len(source),
        f"{name}.files": source.fingerprint(),
        f"{name}.labels": _digest(source.labels, *source.classes),
    }


def facts_of_known_labels(labels: NDArray[np.int64]) -> Facts:
    """How many labels the method may see, and which."""
    return {"known_labels.count": int((labels >= 0).sum()), "known_labels.values": _digest(labels)}


def digest(facts: Facts) -> str:
    """16 hexadecimal digits that stand for the facts which must not differ."""
    return hashlib.sha256(json.dumps(binding(facts), sort_keys=True).encode()).hexdigest()[:16]


def require_equal_on_ranks(facts: Facts) -> None:
    """Raise ConfigError, on all ranks, where a fact differs that is not a machine's own; all ranks must call it."""
    if world_size() == 1:
        return
    everyone: list[Facts] = [{}] * world_size()
    dist.all_gather_object(everyone, facts)
    for number, there in enumerate(everyone):
        for name, first, other in differing(everyone[0], there):
            if name not in _OF_A_MACHINE:
                raise ConfigError(
                    f"{in_words(name)} is {other} on rank {number} and {first} on rank 0; start all processes with the "
                    "same options and the same images"
                )


def binding(facts: Facts) -> Facts:
    """The facts that must not differ between a run and its checkpoints."""
    return {name: value for name, value in facts.items() if name not in HARMLESS}


def require_same_run(then: Facts, now: Facts, where: object) -> None:
    """Raise ConfigError where `now` is another run than the one that `then`, kept in `where`, belongs to."""
    for name, before, after in differing(binding(_completed(then, now)), binding(now)):
        raise ConfigError(
            f"{in_words(name)} is {after} in this run and was {before} in the run that wrote {where}; put back what "
            "that run had, or start a new run in another --run.dir"
        )


def require_same_options(then: Facts, config: Config, where: object) -> None:
    """As `require_same_run`, for whoever has other images on purpose."""
    options = {name: value for name, value in then.items() if name.partition(".")[0] not in MEASURED}
    require_same_run(options, facts_of_options(config), where)


def harmless_changes(then: Facts, now: Facts) -> Iterator[str]:
    """A sentence for each difference that a run may have between its start and a restart."""
    for name, before, after in differing(_completed(then, now), now):
        if name in HARMLESS:
            yield f"{in_words(name)} is {after} from here on and was {before} before"


def require_same_rates(
    optim: OptimConfig, *, done: int, then: int, now: int, steps_per_epoch: int, whole: bool = False
) -> None:
    """Raise ConfigError where a run of `now` steps cannot go on from `done` steps of one of `then` steps.

    The schedule decides: with "step" a run may become longer or shorter, with a cosine a run of another length would
    have had other rates from the start. `whole`: whether the method itself follows the length.
    """
    if done > now:
        raise ConfigError(
            f"the run has {done} steps behind it and is to have {now} in all; raise --train.steps or --train.epochs"
        )
    if then == now or not done:
        return

    def rate(step: int, total: int) -> float:
        return learning_rate(optim, step, total_steps=total, steps_per_epoch=steps_per_epoch)

    if whole or any(rate(step, then) != rate(step, now) for step in range(done)):
        raise ConfigError(
            f"the run was to have {then} steps and is to have {now} now, and with --optim.schedule {optim.schedule} "
            f"the {done} steps behind it would have been others; put --train.steps and --train.epochs back, or start "
            "a new run"
        )


@torch.no_grad()
def weights_hash(method: nn.Module) -> int:
    """A 64-bit hash of all weights and other state that must be equal on all ranks; waits for the device.

    Queues have `queue_hash`, and the running statistics of batch norm are a rank's own.
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
    """Name and both values of every fact that is not the same in both, options first; None for one that is missing."""
    for name in sorted(then.keys() | now.keys(), key=lambda name: (name.partition(".")[0] in MEASURED, name)):
        before, after = then.get(name), now.get(name)
        if before != after:
            yield name, before, after


def _completed(then: Facts, now: Facts) -> Facts:
    """`then` with what its run did where `now` has a fact that is younger."""
    return {name: value for name, value in _BEFORE.items() if name in now} | then


def in_words(name: str) -> str:
    """What to call a fact in a sentence: an option as it is given, anything else in words."""
    return _IN_WORDS.get(name) or "--" + name.replace("_", "-")


def _digest(values: NDArray[np.int64], *names: str) -> str:
    total = hashlib.sha256(np.ascontiguousarray(values, np.int64).tobytes())
    for name in names:
        total.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return total.hexdigest()[:16]
