"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastssl.config import Config
from fastssl.data import open_splits
from fastssl.device import choose_device, set_numerics
from fastssl.distributed import first_on_each_machine, from_first_rank, rank, world_size
from fastssl.errors import TrainingError
from fastssl.evaluate.online import OnlineKNN
from fastssl.executor import input_executor
from fastssl.methods import METHODS, TrainProgress
from fastssl.models.norm import averaged_statistics
from fastssl.models.queue import gather_state, queue_hash
from fastssl.observe.meter import NonFiniteError, NonFiniteStep, StepMeter
from fastssl.observe.notes import NoteQueue
from fastssl.observe.run_logger import RunLogger
from fastssl.renamed import current_facts
from fastssl.run_folder import Claim
from fastssl.schedule import learning_rate
from fastssl.train.build import build_method, build_step, compiles, train_sampler
from fastssl.train.checkpoint import Checkpoints, path_of
from fastssl.train.identity import (
    MEASURED,
    binding,
    digest,
    facts_of_images,
    facts_of_known_labels,
    facts_of_machine,
    facts_of_options,
    harmless_changes,
    require_equal_on_ranks,
    require_same_rates,
    require_same_run,
    weights_hash,
)
from fastssl.train.signals import EXIT_STOPPED, StopRequest
from fastssl.train.state import load_state, require_whole
from fastssl.train.step import seed_step
from fastssl.train.thread_choice import ThreadChoice

RAW_PIXELS_AT_MOST = 100_000  # Images; above this the baseline costs more than it is worth
SKIPPED_AT_MOST = 10  # Steps; a run that diverges more often will not recover


class Trainer:
    """One run: everything that a configuration builds, and the training loop.

    The run folder is the only state: if it holds a checkpoint, training resumes from it. All ranks run the same loop;
    only rank 0 writes. The run's log gets what `notes` collects.
    """

    def __init__(self, config: Config, folder: Path, notes: NoteQueue):
        self.config, self.folder, self.notes = config, folder, notes
        self.device = choose_device(config.train)
        options = facts_of_options(config)
        require_equal_on_ranks(options)  # Before any collective whose shape depends on the options
        self.numerics = set_numerics(config.train, self.device)
        with first_on_each_machine():  # It builds the index, which the other ranks then read
            splits = open_splits(config)
        self.sampler = train_sampler(config, splits.train)
        self.warnings = notes.take()
        self.total_steps = config.train.steps or config.train.epochs * self.sampler.steps_per_epoch
        queue_dtype = config.method.bank_dtype(self.device, self.numerics.dtype)
        self.facts = options | {
            **facts_of_images("images", splits.train),
            **facts_of_images("test_images", splits.test),
            **(facts_of_known_labels(self.sampler.plan.labels) if METHODS[config.method.name].uses_labels else {}),
            "length.steps": self.total_steps,
            **facts_of_machine(self.device, self.numerics.dtype, queue_dtype),
        }
        require_equal_on_ranks(self.facts)
        dtype = self.numerics.dtype
        self.executor, self.test_executor = (
            input_executor(config.data, source, device=self.device, dtype=dtype, timeout_s=config.train.timeout_s)
            for source in splits
        )
        self.knn = OnlineKNN(config, self.executor, self.test_executor, dtype=dtype)
        self.method = build_method(config, self.device)
        self.train_step = build_step(config, self.method, device=self.device, dtype=dtype)
        train = config.train
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=train.keep_checkpoints, keep_every=train.keep_every)
        self.skipped: list[int] = []
        self.meter_state: dict[str, Any] | None = None
        self.first_step = self._restore()

    @property
    def identity(self) -> dict[str, Any]:
        """The identity section of config.json: a digest, and the facts that are not options."""
        measured = {name: value for name, value in self.facts.items() if name.partition(".")[0] in MEASURED}
        return {"digest": digest(self.facts), **measured}

    def train(self, claim: Claim | None = None) -> int:
        """Train to the end or to a stop signal; returns the exit code. `claim`: rank 0's lock on the run folder."""
        quiet = rank() > 0
        self.claim = claim
        self.logger = RunLogger(self.folder, self.config, total_steps=self.total_steps, quiet=quiet)
        with StopRequest() as stop, self.logger, closing(self.checkpoints):
            first = self._begin()
            while True:
                try:
                    return self._train_from(first, stop)
                except NonFiniteError as error:
                    first = self._skip_step(error.step)

    def _train_from(self, first: int, stop: StopRequest) -> int:
        config, total = self.config.train, self.total_steps
        eval_every = self.config.eval.every_epochs * self.sampler.steps_per_epoch
        meter = StepMeter(self.train_step.stopwatch, scaled=self.train_step.scaler.is_enabled())
        if self.meter_state:
            meter.load_state(self.meter_state)
        threads = ThreadChoice(self.logger.info, fixed=config.deterministic or self.device.type != "cpu")
        with closing(self.executor.stream(self.sampler, first, total)) as stream:
            for batch in meter.timed(stream):
                if batch.step not in self.skipped:
                    progress = TrainProgress(batch.step, total, self.sampler.steps_per_epoch)
                    with threads.timed():
                        output = self.train_step(batch, progress, self._learning_rate(batch.step))
                    meter.add(batch, output)
                completed_steps = batch.step + 1
                last, stopping = completed_steps == total, stop.agreed()
                saving = last or stopping or completed_steps % config.checkpoint_every == 0
                logging = last or completed_steps % config.log_every == 0
                if saving or logging:
                    meter.require_finite()
                if logging:
                    self._report(completed_steps, meter)
                with meter.paused():
                    if last or completed_steps % eval_every == 0:
                        self._evaluate(completed_steps)
                    if saving:
                        self._save(completed_steps, meter.state(), wait=last or stopping)
                if stopping and not last:
                    self.logger.stopped(completed_steps)
                    return EXIT_STOPPED
        self._finish()
        return 0

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            self.config.optim,
            step,
            total_steps=self.total_steps,
            steps_per_epoch=self.sampler.steps_per_epoch,
        )

    def _begin(self) -> int:
        """Log the start, and before the first step evaluate, prepare the method and save; returns the first step."""
        first = self.first_step
        record = self._start_record()
        self._log_setup(record)
        changes = [*self._harmless_changes()]  # Before `start` logs the facts of this start
        self.logger.start(step=first, **record)
        self.logger.notes(first, changes)
        self._flush_notes(first)
        if first == 0:
            self._evaluate(0)
            seed_step(self.config.seed, -1)
            with self.train_step.autocast:
                self.method.prepare(self.executor.stream(self.sampler, 0, self.sampler.steps_per_epoch))
            # Finds an unwritable disk before any step, and gives a skipped step a state to go back to
            self._save(0, {}, wait=True)
        return first

    def _log_setup(self, record: dict[str, Any]) -> None:
        """Log what is trained on what, and the warnings of the input; `record` as of `_start_record`."""
        info = self.logger.info
        ranks = f" on {record['ranks']} processes" if record["ranks"] > 1 else ""
        info(
            f"{self.config.method.name} on {record['images']} images ({record['labels']} labels used), "
            f"{self.total_steps} steps of {self.sampler.global_batch_size}{ranks}; run folder {self.folder}"
        )
        compiled = "compiled" if compiles(self.config, self.device) else "not compiled"
        graph = ", CUDA graph" if self.config.train.cuda_graph else ""
        info(f"{self.device}, {self.numerics.text}, {compiled}{graph}, {self.executor.name} pipeline")
        for warning in self.warnings:
            info(f"warning: {warning}")

    def _start_record(self) -> dict[str, Any]:
        plan = self.sampler.plan
        return {
            "images": plan.num_samples,
            "labels": int((plan.labels >= 0).sum()) if self.method.uses_labels else 0,
            "ranks": world_size(),
            "identity": digest(self.facts),
            "facts": self.facts,
        }

    def _harmless_changes(self) -> Iterator[str]:
        """A sentence for each option that has changed since the last start of this run."""
        starts = [record for record in self.logger.log.read() if record["event"] == "start"]
        then = starts[-1].get("facts") if starts and self.first_step else None
        if isinstance(then, dict):
            yield from harmless_changes(current_facts(then), self.facts)

    def _flush_notes(self, completed_steps: int) -> None:
        self.logger.notes(completed_steps, self.notes.take())

    def _report(self, completed_steps: int, meter: StepMeter) -> None:
        self._flush_notes(completed_steps)
        values = meter.read()
        unreadable = self._compare_ranks(completed_steps)
        if "loss" in values:  # Else every step since the last line was skipped
            self.logger.train(
                completed_steps, values, lr=self._learning_rate(completed_steps - 1), unreadable=unreadable
            )

    def _compare_ranks(self, completed_steps: int) -> int:
        """Require equal weights and queues on all ranks; returns how many images at least one rank could not read."""
        if world_size() == 1:
            return len(self.executor.unreadable)
        everyone: list[Any] = [None] * world_size()
        hashes = {"weights": weights_hash(self.method), "queues": queue_hash(self.method)}
        dist.all_gather_object(everyone, (hashes, list(self.executor.unreadable)))
        hashes_of_ranks, unreadable = zip(*everyone, strict=True)
        for what in hashes:
            if len({of_rank[what] for of_rank in hashes_of_ranks}) > 1:
                raise TrainingError(
                    f"the {what} of the processes differ after step {completed_steps}, which is a bug in fastssl: "
                    f"please report it with {self.folder}/config.json and env.json; the last checkpoint may be wrong"
                )
        return len(set().union(*unreadable))

    def _evaluate(self, completed_steps: int) -> None:
        if not self.knn.possible:
            return
        started = time.perf_counter()
        with averaged_statistics(self.method):
            top1 = self.knn.top1(self.method.encoder())
        self.logger.evaluation(completed_steps, knn_top1=top1, seconds=time.perf_counter() - started)
        self._flush_notes(completed_steps)

    def _save(self, completed_steps: int, meter_state: dict[str, Any], *, wait: bool) -> None:
        if self.claim:
            self.claim.require()
        with averaged_statistics(self.method) as statistics:
            state = {
                "method": gather_state(self.method),
                "statistics": statistics,
                "optimizer": self.train_step.optimizer.state_dict(),
                "scaler": self.train_step.scaler.state_dict(),
                "skipped": self.skipped,
                "window": meter_state,
                "facts": binding(self.facts),
                "length": self.total_steps,
            }
            if rank() == 0:
                self.checkpoints.save(state, step=completed_steps, wait=wait)
        if wait and world_size() > 1:
            dist.barrier()

    def _restore(self) -> int:
        """Load the newest checkpoint, if any; returns its number of completed steps."""
        state = from_first_rank(self.checkpoints.newest)
        if state is None:
            return 0
        path = path_of(self.checkpoints.folder, state["step"])
        require_whole(state, path)
        self._require_this_run(state, path)
        load_state(self.method, self.train_step.optimizer, state, path)
        if state["scaler"]:  # Empty unless the run was in fp16
            self.train_step.scaler.load_state_dict(state["scaler"])
        self.skipped = sorted({*self.skipped, *state["skipped"]})
        self.meter_state = state["window"] or None
        return state["step"]

    def _require_this_run(self, state: dict[str, Any], path: Path) -> None:
        """Raise ConfigError if the checkpoint belongs to another run."""
        require_same_run(state["facts"], self.facts, path)
        require_same_rates(
            self.config.optim,
            completed_steps=state["step"],
            then=state["length"],
            now=self.total_steps,
            steps_per_epoch=self.sampler.steps_per_epoch,
            follows_length=self.method.follows_length,
        )

    def _skip_step(self, failed: NonFiniteStep) -> int:
        """Restore the last checkpoint and skip `failed` from now on; returns the checkpoint's completed steps.

        TrainingError unless --train.non-finite is skip, or after SKIPPED_AT_MOST skips.
        """
        skips = self.config.train.non_finite == "skip" and len(self.skipped) < SKIPPED_AT_MOST
        if skips:
            with suppress(TrainingError):  # If the last could not be written, restore the one before
                self.checkpoints.flush()
            first = self._restore()
            self.skipped.append(failed.step)
            self.logger.start(step=first, **self._start_record())
            self._flush_notes(first)
        where = f"loss {failed.loss}, gradient norm {failed.gradient_norm} at step {failed.step + 1}"
        ids = self.sampler.ids_of_all_ranks(failed.step).tolist()
        source, named = self.executor.source, self.config.data.root is not None
        self.logger.non_finite(
            failed,
            back_to=first if skips else failed.step + 1,
            action="skipped" if skips else "stopped",
            ids=ids,
            names=[source.name_of(index) for index in ids] if named else [],
        )
        if skips:
            self.logger.info(
                f"{where}: going back to step {first} and skipping that step; its images are listed in metrics.jsonl"
            )
            return first
        already = f", after {SKIPPED_AT_MOST} skipped steps" if self.skipped else ""
        raise TrainingError(
            f"{where}{already}; {self.folder}/metrics.jsonl lists the images of that step, and the last checkpoint is "
            "older: lower --optim.lr, or try --optim.clip-norm 1, --train.precision fp32 or --train.non-finite skip"
        )

    def _finish(self) -> None:
        baselines: dict[str, float] = {}
        if self.knn.possible and self.sampler.plan.num_samples <= RAW_PIXELS_AT_MOST:
            baselines["raw_pixels_top1"] = self.knn.raw_pixels_top1()
        self.logger.finished(**baselines)
        self.logger.info(f"finished; the run folder is {self.folder}")
