"""The training loop: epochs of steps, an evaluation and a checkpoint after each, resumable to the same numbers.

The decision that shaped it: everything a run's future depends on stands in one checkpoint (weights, velocity, schedule,
and of each rank the loader's state, the random state and the sums not yet logged), written between two steps; weights
and velocity whole, whatever the ranks hold. Nothing waits for the device within a step: sums stay there until a
record is due. Left out: flags (cli.py), what learns (learner.py), what is read (feed.py), what is written (journal.py).
"""

import math
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.colorstats import ColorStats
from pipeline.console import set_voice, warn
from pipeline.errors import UserError
from pipeline.loader import Batch
from pipeline.shardset import ShardSet
from trainer.display import choose_display
from trainer.distributed import (
    Ranks,
    StopRequest,
    check_alike,
    gather,
    join,
    reduce_sum,
    restart_count,
)
from trainer.evaluate import Errors, count_errors, evaluate, make_eval_loader
from trainer.feed import TrainFeed
from trainer.finetune import Start, start_from
from trainer.interchange import load_any
from trainer.job import LOG_STEPS
from trainer.job import Job as Job
from trainer.journal import Journal
from trainer.learner import Learner
from trainer.lossguard import LossGuard, StuckLoss
from trainer.memory import GpuMeter
from trainer.model import AlexNet
from trainer.parallel import check as check_parallel
from trainer.recipe import to_dict
from trainer.resume import EPOCH, check_resumable, choose_streams, find_resumed, load_resumed
from trainer.runfacts import (
    describe,
    get_random_state,
    list_arithmetic,
    list_facts,
    name_changes,
    set_random_state,
)
from trainer.runlog import BEST, CHECKPOINTS
from trainer.saving import Saver, list_steps
from trainer.tally import Tally
from trainer.tensorboard import Board, open_board
from trainer.watchdog import Watchdog


def run_rank(job: Job) -> int:
    """The whole run as seen by one rank. Returns the exit status: 0, or 130/143 when stopped by a signal."""
    set_voice(job.voice)
    timeout_s = job.safety.timeout_s
    with (
        join(job.use_gpu, timeout_s) as ranks,
        StopRequest(ranks) as stop,
        Watchdog(ranks, timeout_s) as watchdog,
    ):
        run = _Run(job, ranks, watchdog)
        try:
            return run.train(stop)
        except Exception:
            run.saver.close()  # but not for a second SIGINT, which leaves at once
            raise
        finally:
            run.journal.close()


class _Stopped(Exception):
    """A signal came during an evaluation."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Run:
    """A run in progress: what is trained, what feeds it, how far it is."""

    def __init__(self, job: Job, ranks: Ranks, watchdog: Watchdog) -> None:
        self.job, self.ranks, self.watchdog, recipe = job, ranks, watchdog, job.recipe
        check_parallel(job.parallel.mode, recipe, ranks.world_size)
        self.resume = find_resumed(job, ranks)
        self.shards = ShardSet.open(job.shards, cache_dir=job.cache_dir, cache_gib=job.cache_gib)
        self.colors = ColorStats.load(self.shards.root, self.shards.fingerprint)
        self.has_val = self.shards.num_samples("val") > 0
        if not self.has_val and recipe.schedule == "plateau":
            raise UserError(
                f"{self.shards.root}: no validation images, but recipe {recipe.name} cuts its rate when their error "
                "stalls; shard a source with val/, or use --set schedule=cosine"
            )
        saved = load_resumed(job, self.resume, warn if ranks.is_first else lambda _: None)
        check_alike(list_facts(job, self.shards, self.colors, saved), ranks)
        if saved:
            check_resumable(saved, self.resume, self.shards, ranks)
            changed = name_changes(saved.get("arithmetic", {}), ranks)
            if changed and ranks.is_first:
                warn(f"warning: {self.resume}: from here on not to the same bits ({changed})")
        self.started_from: Start | None = None
        start = self._start_from if job.weights and not saved else None
        self.learner = Learner(recipe, self.shards.num_classes, ranks, job.seed, job.parallel, start)
        self.step, self.epoch, self.time_s, self.best_error = 0, 1, 0.0, math.inf
        self.before_evaluation: dict[str, Any] | None = None  # this rank's place after an epoch's last step
        self.sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
        streams = choose_streams(job.seed, saved, ranks)
        torch.manual_seed(streams.dropout)
        self.feed = TrainFeed(
            self.shards,
            self.colors,
            recipe,
            ranks,
            seed=streams.feed,
            epoch=int(saved["epoch"]) if saved else 1,
            num_threads=job.num_threads,
            feeding=job.feeding,
            whole=self.learner.split.mode == "columns",
        )
        if saved:
            self._restore(saved)
        self.eval_loader = (
            make_eval_loader(self.shards, self.colors, recipe, ranks, "centre", job.num_threads)
            if self.has_val
            else None
        )
        self.journal = Journal(
            ranks, job.runs, job.name, describe(job, self.shards, ranks, self.started_from), self.colors,
            resume=self.resume, step=self.step, epoch=self.epoch, voice=job.voice,
            make_board=self._open_board if job.tensorboard else None,
        )  # fmt: skip
        self.saver = Saver(
            self.journal.folder / CHECKPOINTS,
            ranks,
            keep=job.safety.keep_checkpoints,
            minutes=job.safety.checkpoint_minutes,
            before=self.journal.sync,
            tell=self._tell_unsaved,
            alive=lambda: self.watchdog.beat("a piece of a checkpoint"),
        )
        self.is_prepared = False
        self.guard = LossGuard(
            ranks,
            self.journal.folder,
            job.safety.on_nonfinite,
            list(self.learner.model.parameters()),
            int(saved.get("skipped", 0)) if saved else 0,
        )
        self.stuck = StuckLoss(self.shards.num_classes, len(self.feed))

    def _open_board(self, run: Path) -> Board:
        return open_board(run, self.shards, self.colors, self.job.recipe, self.step if self.resume else None)

    def _start_from(self, model: AlexNet) -> None:
        assert self.job.weights is not None
        weights = load_any(self.job.weights, is_completed=False)
        self.started_from = start_from(model, weights, self.shards.manifest.classes)

    def train(self, stop: StopRequest) -> int:
        recipe, steps_per_epoch = self.job.recipe, len(self.feed)
        precision = "bfloat16 autocast" if self.learner.dtype == torch.bfloat16 else "float32"
        where = f"{self.ranks.world_size} x {self.ranks.device.type}, {precision}"
        if self.ranks.world_size > 1:
            where = f"{where}, {self.learner.split.mode}"
        steps = f"{steps_per_epoch} steps of {recipe.global_batch_size} images an epoch"
        if self.started_from:
            self.journal.say(self.started_from.describe())
        self.journal.say(f"{self.journal.folder}: recipe {recipe.name}, {where}, {steps}")
        self.journal.announce(
            recipe=recipe.name, epochs=recipe.epochs, steps_per_epoch=steps_per_epoch, step=self.step,
            global_batch_size=recipe.global_batch_size, world_size=self.ranks.world_size,
            device=self.ranks.device.type,
        )  # fmt: skip
        if restart_count():
            self.journal.say(f"restart {restart_count()}: goes on after step {self.step}")
            self.journal.event("restart", step=self.step, number=restart_count())
        tally = Tally(recipe.epochs, steps_per_epoch, steps_done=self.step, best_error=self.best_error)
        stopped, status = "", 0
        with choose_display(self.job.voice if self.ranks.is_first else "quiet", tally) as display:
            self.journal.show(display)
            self.watchdog.beat("the start")
            while not self.learner.schedule.finished(self.epoch - 1):
                status = self._train_epoch(stop) or self._end_epoch(stop)
                if status:
                    self._save()
                    where = f"stopped after step {self.step} (epoch {self.epoch})"
                    stopped = f"{where}; go on with: alexnet-train --resume {self.journal.folder}"
                    break
            self.saver.finish()
        if not stopped:
            which = "alexnet-eval {0}, alexnet-report {0}" if self.has_val else "alexnet-report {0}"
            self.journal.say(f"complete after epoch {self.epoch - 1}; next: {which.format(self.journal.folder)}")
        self.journal.end(status, self.step, stopped)
        return status

    def _train_epoch(self, stop: StopRequest) -> int:
        self.feed.begin_epoch(self.epoch)
        self.learner.net.train()
        num_steps, batches = len(self.feed), iter(self.feed)
        if self.feed.step == num_steps:  # resumed between an epoch's last step and its evaluation
            self.before_evaluation = self._place()
        since_s, waited_s, num_timed = time.perf_counter(), 0.0, 0
        while True:
            asked_s = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return 0
            waited_s += time.perf_counter() - asked_s
            in_epoch = self.feed.step
            self.learner.schedule.begin_step(self.epoch, in_epoch - 1, num_steps)
            self._learn(batch)
            if not self.is_prepared:  # after a step, when there is a velocity
                self.saver.prepare(self.learner.state_dict())
                self.is_prepared = True
            self.journal.stepped(self.epoch, in_epoch)
            num_timed += len(batch.labels) * self.ranks.world_size
            if in_epoch % LOG_STEPS == 0 or in_epoch == num_steps:
                self.saver.check()
                record, is_due = self._take_sums(self.saver.is_due())
                now_s = time.perf_counter()
                took_s = now_s - since_s
                self.time_s += took_s
                num_logged = (in_epoch - 1) % LOG_STEPS + 1
                self._record(record, num_logged, num_timed / took_s, waited_s / took_s)
                since_s, waited_s, num_timed = now_s, 0.0, 0
                if in_epoch == num_steps:
                    self.before_evaluation = self._place()
                if is_due and in_epoch < num_steps:
                    self._save()
            status = stop.status()  # every rank's: they all have come here
            self.watchdog.beat(f"step {self.step} of epoch {self.epoch}")
            if status:
                self.time_s += time.perf_counter() - since_s
                return status

    def _learn(self, batch: Batch) -> None:
        self.step, guard = self.step + 1, self.guard
        guard.begin(self.step, self.feed.keys, epoch=self.epoch, lr=self.learner.schedule.lr)
        try:
            logits = self.learner.step(batch.images, batch.labels, guard.may_update if guard.asks else None)
        except torch.OutOfMemoryError:
            logits = None  # outside of this clause, which holds on to what the step has made
        if logits is None:
            raise UserError(self.learner.explain_out_of_memory(batch.images, batch.labels, GpuMeter()))
        if guard.has_skipped:  # neither learnt from nor counted
            self.journal.event("nonfinite_skipped", step=self.step, epoch=self.epoch, total=guard.skipped)
            return
        counted = count_errors(logits, batch.labels)
        guard.saw(counted[1])
        self.sums += counted

    def _take_sums(self, wish: bool) -> tuple[Errors, bool]:
        """What was summed since the last record, over all ranks, and whether any has a wish; the sums begin anew."""
        asked = torch.full((1,), float(wish), dtype=self.sums.dtype, device=self.sums.device)
        *sums, num_wishes = reduce_sum(torch.cat((self.sums, asked)), self.ranks).tolist()
        count, loss, wrong1, wrong5 = sums
        self.sums.zero_()
        each = 1 / count if count else math.nan  # all skipped
        return Errors(int(count), loss * each, 100 * wrong1 * each, 100 * wrong5 * each), num_wishes > 0

    def _record(self, got: Errors, num_steps: int, rate: float, waited: float) -> None:
        self.journal.train(
            got,
            step=self.step,
            epoch=self.epoch,
            lr=self.learner.schedule.lr,
            images_per_s=rate,
            data_wait_fraction=waited,
            time_s=self.time_s,
        )
        if not math.isfinite(got.loss) and not self.guard.asks:
            self.guard.stop(got.loss)
        said = self.stuck.watch(got.loss, num_steps, self.learner.schedule.lr)
        if said and self.ranks.is_first:
            warn(f"warning: {said}")
            self.journal.event("loss_stuck", step=self.step, epoch=self.epoch, text=said)

    def _end_epoch(self, stop: StopRequest) -> int:
        """Evaluate and begin to save: 0. Or, where a signal comes first, its status: a resumed run evaluates anew."""
        epoch, is_best, result, top1_error = self.epoch, True, "", math.nan
        if self.eval_loader is not None:
            self.journal.evaluating(epoch)
            num_images = self.shards.num_samples("val")
            model, dtype = self.learner.whole_model(), self.learner.dtype

            def go_on() -> None:
                self.watchdog.beat(f"a batch of the evaluation after epoch {epoch}")
                status = stop.status()  # every rank's: all have as many batches
                if status:
                    raise _Stopped(status)

            try:
                errors = evaluate(model, self.eval_loader, self.ranks, dtype, num_images, on_batch=go_on)
            except _Stopped as stopped:
                return stopped.status
            top1_error = errors.top1_error
            is_best = top1_error < self.best_error
            self.best_error = min(self.best_error, top1_error)
            self.journal.eval(errors, self.step, epoch)
            self.journal.look(model, dtype, self.step)
            best = "" if is_best else f" (best {self.best_error:.2f} %)"
            result = f"top-1 error {top1_error:.2f} %{best}, top-5 {errors.top5_error:.2f} %, "
        result += self._end_schedule(epoch, top1_error)
        self.journal.epoch_done(epoch, result)
        self.epoch += 1
        self.before_evaluation = None
        self._save(EPOCH, *([BEST] if is_best else []))
        self.learner.rest()
        return 0

    def _place(self) -> dict[str, Any]:
        """What is this rank's own in a checkpoint."""
        return {"loader": self.feed.state_dict(), "sums": self.sums.cpu(), "random": get_random_state(self.ranks)}

    def _end_schedule(self, epoch: int, top1_error: float) -> str:
        """What the schedule makes of the epoch, recorded; for its line. Only a plateau looks at the error."""
        schedule = self.learner.schedule
        before = schedule.rate(epoch, 0, 1)
        news = schedule.end_epoch(epoch, top1_error)
        if not news:
            return ""
        is_cut = schedule.rate(epoch + 1, 0, 1) < before
        self.journal.event("lr_cut" if is_cut else "schedule", step=self.step, epoch=epoch, text=news)
        return f"{news}, "

    def _save(self, *names: str) -> None:
        """Begin to save; the checkpoint will have `names`, too."""
        self.saver.wait()
        mine = self.before_evaluation or self._place()
        states, learnt = gather(mine, self.ranks), self.learner.state_dict()
        state = {
            **learnt,
            "recipe": to_dict(self.job.recipe),
            "num_classes": self.shards.num_classes,
            "shards_fingerprint": self.shards.fingerprint,
            "seed": self.job.seed,
            "feed_seed": self.feed.seed,
            "step": self.step,
            "epoch": self.epoch,
            "time_s": self.time_s,
            "best_error": self.best_error,
            "skipped": self.guard.skipped,
            "is_best": BEST in names,
            "arithmetic": list_arithmetic(self.ranks),
            "ranks": states,
        }
        self.saver.begin(state, self.step, names)

    def _tell_unsaved(self, step: int, what: str) -> None:
        kept = next(iter(list_steps(self.journal.folder / CHECKPOINTS)), None)
        rest = f"that of step {kept} is kept" if kept is not None else "there is none before it"
        warn(f"warning: no checkpoint of step {step}: {what}; {rest}, training goes on and will try again")
        self.journal.event("checkpoint_failed", step=step, reason=what)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.learner.load_state_dict(saved)
        self.step, self.epoch = int(saved["step"]), int(saved["epoch"])
        self.time_s, self.best_error = saved["time_s"], saved["best_error"]
        if len(saved["ranks"]) != self.ranks.world_size:
            return  # an epoch begins, with the streams of choose_streams
        mine = saved["ranks"][self.ranks.rank]
        self.sums.copy_(mine["sums"])
        self.feed.load_state_dict(mine["loader"], self.epoch)
        set_random_state(mine["random"], self.ranks)
