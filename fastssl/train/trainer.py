"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
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
from fastssl.observe.meter import NonFiniteStep, StepMeter
from fastssl.observe.notes import NoteQueue
from fastssl.observe.run_logger import Reporter
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

RAW_PIXELS_AT_MOST = 100_000  # images; beyond that the baseline costs more than it tells
SKIPPED_AT_MOST = 10  # steps that are left out; a run that breaks more often is not about to recover


class NonFiniteError(Exception):
    """A step broke; carries the first one that did."""

    def __init__(self, broken: NonFiniteStep):
        super().__init__(broken)
        self.broken = broken


class Trainer:
    """One run: everything that a configuration builds, and the loop over it.

    The run folder is the only memory: with a checkpoint in it, training goes on from there. All ranks run the same
    loop; the first one alone writes. What `notes` collects is written to the run's log.
    """

    def __init__(self, config: Config, folder: Path, notes: NoteQueue):
        self.config, self.folder, self.notes = config, folder, notes
        self.device = choose_device(config.train)
        options = facts_of_options(config)
        require_equal_on_ranks(options)  # before anything that would wait for the others in another shape
        self.numerics = set_numerics(config.train, self.device)
        with first_on_each_machine():  # which makes the index, for the others to find it
            splits = open_splits(config)
        self.steps = train_sampler(config, splits.train)
        self.warnings = notes.take()
        self.total_steps = config.train.steps or config.train.epochs * self.steps.steps_per_epoch
        queue_dtype = config.method.bank_dtype(self.device, self.numerics.dtype)
        self.facts = options | {
            **facts_of_images("images", splits.train),
            **facts_of_images("test_images", splits.test),
            **(facts_of_known_labels(self.steps.plan.labels) if METHODS[config.method.name].uses_labels else {}),
            "length.steps": self.total_steps,
            "machine.device": self.device.type,
            "machine.dtype": f"{self.numerics.dtype}".removeprefix("torch."),
            "machine.queue_dtype": f"{queue_dtype}".removeprefix("torch."),
            "machine.torch": str(torch.__version__),
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
        self.window_state: dict[str, Any] | None = None
        self.first_step = self._restore()

    @property
    def identity(self) -> dict[str, Any]:
        """What config.json holds of the identity of a run: a digest, and what the options beside it do not say."""
        measured = {name: value for name, value in self.facts.items() if name.partition(".")[0] in MEASURED}
        return {"digest": digest(self.facts), **measured}

    def train(self, claim: Claim | None = None) -> int:
        """Train to the end or to a stop signal; returns the exit code. `claim`: the first rank's hold on the folder."""
        quiet = rank() > 0
        self.claim = claim
        self.reporter = Reporter(self.folder, self.config, total_steps=self.total_steps, quiet=quiet)
        with StopRequest() as stop, self.reporter, closing(self.checkpoints):
            first = self._begin()
            while True:
                try:
                    return self._train_from(first, stop)
                except NonFiniteError as error:
                    first = self._skip_step(error.broken)

    def _train_from(self, first: int, stop: StopRequest) -> int:
        config, total = self.config.train, self.total_steps
        eval_every = self.config.eval.every_epochs * self.steps.steps_per_epoch
        window = StepMeter(self.train_step.stopwatch, scaled=self.train_step.scaler.is_enabled())
        if self.window_state:
            window.load_state(self.window_state)
        threads = ThreadChoice(self.reporter.say, fixed=config.deterministic or self.device.type != "cpu")
        with closing(self.executor.stream(self.steps, first, total)) as stream:
            for batch in window.timed(stream):
                if batch.step not in self.skipped:
                    progress = TrainProgress(batch.step, total, self.steps.steps_per_epoch)
                    with threads.timed():
                        output = self.train_step(batch, progress, self._learning_rate(batch.step))
                    window.add(batch, output)
                done = batch.step + 1
                last, stopping = done == total, stop.agreed()
                saving = last or stopping or done % config.checkpoint_every == 0
                logging = last or done % config.log_every == 0
                if (saving or logging) and (broken := window.broken()):
                    raise NonFiniteError(broken)
                if logging:
                    self._report(done, window)
                with window.paused():
                    if last or done % eval_every == 0:
                        self._evaluate(done)
                    if saving:
                        self._save(done, window.state(), wait=last or stopping)
                if stopping and not last:
                    self.reporter.stopped(done)
                    return EXIT_STOPPED
        self._finish()
        return 0

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            self.config.optim,
            step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps.steps_per_epoch,
        )

    def _begin(self) -> int:
        plan, first, say = self.steps.plan, self.first_step, self.reporter.say
        known = int((plan.labels >= 0).sum()) if self.method.uses_labels else 0
        ranks = f" on {world_size()} processes" if world_size() > 1 else ""
        say(
            f"{self.config.method.name} on {plan.num_samples} images ({known} labels used), "
            f"{self.total_steps} steps of {self.steps.global_batch_size}{ranks}; run folder {self.folder}"
        )
        compiled = "compiled" if compiles(self.config, self.device) else "not compiled"
        graph = ", CUDA graph" if self.config.train.cuda_graph else ""
        say(f"{self.device}, {self.numerics.text}, {compiled}{graph}, {self.executor.name} pipeline")
        for warning in self.warnings:
            say(f"warning: {warning}")
        changes = [*self._harmless_changes()]
        self.start_record = {"images": plan.num_samples, "labels": known, "ranks": world_size()} | {
            "identity": digest(self.facts),
            "facts": self.facts,
        }
        self.reporter.start(step=first, **self.start_record)
        self.reporter.notes(first, changes)
        self._flush_notes(first)
        if first == 0:
            self._evaluate(0)
            seed_step(self.config.seed, -1)
            with self.train_step.autocast:
                self.method.prepare(self.executor.stream(self.steps, 0, self.steps.steps_per_epoch))
            # a disk that cannot be written is found now, and there is a state to go back to
            self._save(0, {}, wait=True)
        return first

    def _harmless_changes(self) -> Iterator[str]:
        """What differs from the last start of this run, if there was one."""
        starts = [record for record in self.reporter.log.read() if record["event"] == "start"]
        then = starts[-1].get("facts") if starts and self.first_step else None
        if isinstance(then, dict):
            yield from harmless_changes(current_facts(then), self.facts)

    def _flush_notes(self, done: int) -> None:
        self.reporter.notes(done, self.notes.take())

    def _report(self, done: int, window: StepMeter) -> None:
        self._flush_notes(done)
        values = window.read()
        unreadable = self._compare_ranks(done)
        if "loss" in values:  # not all steps of the window were left out
            self.reporter.train(done, values, lr=self._learning_rate(done - 1), unreadable=unreadable)

    def _compare_ranks(self, done: int) -> int:
        """Require that all ranks have the same weights and queue; the number of images that any could not read."""
        if world_size() == 1:
            return len(self.executor.unreadable)
        everyone: list[Any] = [None] * world_size()
        hashes = {"weights": weights_hash(self.method), "queues": queue_hash(self.method)}
        dist.all_gather_object(everyone, (hashes, list(self.executor.unreadable)))
        found, unreadable = zip(*everyone, strict=True)
        for what in hashes:
            if len({of_rank[what] for of_rank in found}) > 1:
                raise TrainingError(
                    f"the {what} of the processes differ after step {done}, which must never be: please report it with "
                    f"{self.folder}/config.json and env.json; the last checkpoint may be wrong too"
                )
        return len(set().union(*unreadable))

    def _evaluate(self, done: int) -> None:
        if not self.knn.possible:
            return
        started = time.perf_counter()
        with averaged_statistics(self.method):
            top1 = self.knn.top1(self.method.encoder())
        self.reporter.evaluation(done, knn_top1=top1, seconds=time.perf_counter() - started)
        self._flush_notes(done)

    def _save(self, done: int, window: dict[str, Any], *, wait: bool) -> None:
        if self.claim:
            self.claim.require()
        with averaged_statistics(self.method) as statistics:
            state = {
                "method": gather_state(self.method),
                "statistics": statistics,
                "optimizer": self.train_step.optimizer.state_dict(),
                "scaler": self.train_step.scaler.state_dict(),
                "skipped": self.skipped,
                "window": window,
                "facts": binding(self.facts),
                "length": self.total_steps,
            }
            if rank() == 0:
                self.checkpoints.save(state, step=done, wait=wait)
        if wait and world_size() > 1:
            dist.barrier()

    def _restore(self) -> int:
        """Load the newest checkpoint, if any, and return the number of steps that it has behind it."""
        state = from_first_rank(self.checkpoints.newest)
        if state is None:
            return 0
        path = path_of(self.checkpoints.folder, state["step"])
        require_whole(state, path)
        self._require_this_run(state, path)
        load_state(self.method, self.train_step.optimizer, state, path)
        if state["scaler"]:  # empty where the run was not in fp16
            self.train_step.scaler.load_state_dict(state["scaler"])
        self.skipped = sorted({*self.skipped, *state["skipped"]})
        self.window_state = state["window"] or None
        return state["step"]

    def _require_this_run(self, state: dict[str, Any], path: Path) -> None:
        """ConfigError where a checkpoint belongs to another run."""
        require_same_run(state["facts"], self.facts, path)
        require_same_rates(
            self.config.optim,
            done=state["step"],
            then=state["length"],
            now=self.total_steps,
            steps_per_epoch=self.steps.steps_per_epoch,
            whole=self.method.follows_length,
        )

    def _skip_step(self, broken: NonFiniteStep) -> int:
        """Go back to the last checkpoint and have `broken` skipped from there; TrainingError where that is not wanted.

        Returns the number of steps that are done there.
        """
        skips = self.config.train.non_finite == "skip" and len(self.skipped) < SKIPPED_AT_MOST
        if skips:
            with suppress(TrainingError):  # where the last could not be written, the one before is taken
                self.checkpoints.flush()
            first = self._restore()
            self.skipped.append(broken.step)
            self.reporter.start(step=first, **self.start_record)
            self._flush_notes(first)
        where = f"loss {broken.loss}, gradient norm {broken.gradient_norm} at step {broken.step + 1}"
        ids = self.steps.ids_of_all_ranks(broken.step).tolist()
        source, named = self.executor.source, self.config.data.root is not None
        self.reporter.non_finite(
            broken,
            back_to=first if skips else broken.step + 1,
            action="skipped" if skips else "stopped",
            ids=ids,
            names=[source.name_of(index) for index in ids] if named else [],
        )
        if skips:
            self.reporter.say(
                f"{where}: back to step {first} to go on without that step; its images are in metrics.jsonl"
            )
            return first
        allowed = f", after {SKIPPED_AT_MOST} that were skipped" if self.skipped else ""
        raise TrainingError(
            f"{where}{allowed}; the images of that step are in {self.folder}/metrics.jsonl and the last checkpoint is "
            "from before: lower --optim.lr, try --optim.clip-norm 1, --train.precision fp32 or --train.non-finite skip"
        )

    def _finish(self) -> None:
        baselines: dict[str, float] = {}
        if self.knn.possible and self.steps.plan.num_samples <= RAW_PIXELS_AT_MOST:
            baselines["raw_pixels_top1"] = self.knn.raw_pixels_top1()
        self.reporter.finished(**baselines)
        self.reporter.say(f"the run is in {self.folder}")
