"""Part of the sample plan for each step: training repeats it epoch after epoch, evaluation goes through it once."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastssl_pipelines.errors import DataError
from fastssl_pipelines.plan import BatchPlan, SamplePlan


class Sampler(Protocol):
    """Protocol of TrainSampler and EvaluationSampler: `at(step, unreadable)` is the BatchPlan of a step."""

    def at(self, step: int, unreadable: NDArray[np.bool_] | None = None) -> BatchPlan: ...


class TrainSampler:
    """This rank's BatchPlan for every training step, `sampler[step]`; the incomplete last batch is dropped.

    The ranks take consecutive slices of the global batch, so the samples of a step do not depend on the number of
    ranks.
    """

    def __init__(self, plan: SamplePlan, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch size {batch_size} on rank {rank} of {world_size} was given; --train.batch-size must"
                " be at least 1 and the rank below the number of ranks"
            )
        self.plan = plan
        self.batch_size = batch_size
        self.rank = rank
        self.global_batch_size = batch_size * world_size
        self.steps_per_epoch = plan.num_samples // self.global_batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"--train.batch-size {batch_size} on {world_size} ranks needs {self.global_batch_size} images"
                f" and the data set has {plan.num_samples}; give a smaller one"
            )

    def __getitem__(self, step: int) -> BatchPlan:
        return self.at(step)

    def at(self, step: int, unreadable: NDArray[np.bool_] | None = None) -> BatchPlan:
        """Plan of a step, with the next image in place of each `unreadable` one (see `SamplePlan.batch`)."""
        if step < 0:
            raise IndexError(f"step {step} was asked for; steps count from 0")
        epoch, start = self._place(step)
        start += self.rank * self.batch_size
        return self.plan.batch(epoch, start, start + self.batch_size, odd=step % 2 == 1, unreadable=unreadable)

    def ids_of_all_ranks(self, step: int) -> NDArray[np.int64]:
        """Images that the plan has for a step on all ranks together, readable or not."""
        epoch, start = self._place(step)
        return self.plan.batch(epoch, start, start + self.global_batch_size).ids

    def _place(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and the position in it at which the first rank starts."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self.global_batch_size


class EvaluationSampler:
    """BatchPlans that go through the sample plan once, in order; the last batch may be smaller.

    An unreadable image is not evaluated: the label of its row is -1.
    """

    def __init__(self, plan: SamplePlan, *, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size} was given; it must be at least 1")
        self.plan = plan
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.plan.num_samples // self.batch_size)

    def __getitem__(self, step: int) -> BatchPlan:
        return self.at(step)

    def at(self, step: int, unreadable: NDArray[np.bool_] | None = None) -> BatchPlan:
        """Plan of a step, with another image and label -1 in place of each `unreadable` one."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} was asked for; there are {len(self)}")
        start = step * self.batch_size
        stop = min(start + self.batch_size, self.plan.num_samples)
        plan = self.plan.batch(0, start, stop, unreadable=unreadable)
        return replace(plan, labels=np.where(plan.replaced, -1, plan.labels))
