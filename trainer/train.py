"""One run: set up, then step, log, evaluate and save until the last epoch is done."""

import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.colors import ColorStats
from pipeline.common.console import note, set_voice, spell_command, warn
from pipeline.common.errors import UserError
from pipeline.loader import Batch
from pipeline.shards import GET_VAL, ShardSet
from trainer.checkpoint import EPOCH, Saver, State, check_resumable, choose_streams, find_resumed, load_resumed
from trainer.config import LOG_STEPS, Job
from trainer.data import TrainFeed
from trainer.distributed import (
    LAUNCH_ID,
    Ranks,
    check_alike,
    gather,
    join,
    launch_id,
    reduce_sum,
    restart_count,
    under_launcher,
)
from trainer.evaluate import Errors, count_errors, evaluate, make_eval_loader
from trainer.model import AlexNet
from trainer.nets.finetune import Start, start_from
from trainer.nets.formats import load_any
from trainer.nets.weights import list_classes
from trainer.parallel import check as check_parallel
from trainer.recipe import Recipe, to_dict
from trainer.record.environment import find_changes, list_arithmetic
from trainer.record.logger import Board, Logger
from trainer.record.progress import Progress, choose_display
from trainer.record.runs import BEST, CHECKPOINTS
from trainer.safety import LossGuard, StopRequest, StuckLoss, Watchdog
from trainer.step import Learner, explain_out_of_memory

# The TensorBoard of a run: its folder, shards, colours and recipe; if it is resumed, the step of its checkpoint.
OpenBoard = Callable[[Path, ShardSet, ColorStats, Recipe, int | None], Board]
_OF_THIS_MACHINE = ("num_threads", "num_local_ranks")


def run_rank(job: Job, open_board: OpenBoard | None = None) -> int:
    """The whole run as seen by one rank. Returns the exit status: 0, or 129/130/143 when stopped by a signal."""
    set_voice(job.voice)
    timeout_s = job.safety.timeout_s
    with (
        join(job.use_gpu, timeout_s) as ranks,
        StopRequest(ranks) as stop,
        Watchdog(ranks, timeout_s) as watchdog,
    ):
        set_voice(job.voice if ranks.is_first else "quiet")
        run = Run(job, ranks, stop, watchdog, open_board)
        try:
            return run.train()
        except Exception:
            run.saver.close()  # but not for a second SIGINT, which leaves at once
            raise
        finally:
            run.logger.close()


class _Stopped(Exception):
    """A signal came during an evaluation: its exit status."""


class Run:
    """A run in progress, on one rank."""

    def __init__(
        self, job: Job, ranks: Ranks, stop: StopRequest, watchdog: Watchdog, open_board: OpenBoard | None
    ) -> None:
        """Set up; a run that goes on is where its checkpoint was. Raises UserError for what does not fit together."""
        self.job, self.ranks, self.stop, self.watchdog, recipe = job, ranks, stop, watchdog, job.recipe
        check_parallel(job.parallel.mode, recipe, ranks.world_size)
        folder = find_resumed(job, ranks)
        self.shards = ShardSet.open(job.shards, cache_dir=job.cache_dir)
        self.colors = ColorStats.load(self.shards.root, self.shards.fingerprint)
        has_val = self.shards.num_samples("val") > 0
        if not has_val and recipe.schedule == "plateau":
            raise UserError(
                f"{self.shards.root}: no validation images, but recipe {recipe.name} cuts its rate when their error "
                f"stalls; use --set schedule=cosine, or {GET_VAL}"
            )
        if not has_val and ranks.is_first:
            note(f"{self.shards.root}: no validation images, so no error is measured; {GET_VAL}")
        saved = load_resumed(job, folder, warn if ranks.is_first else lambda _: None)
        check_alike(list_settings(job, self.shards, self.colors, saved), ranks)
        if saved:
            check_resumable(saved, folder, self.shards, ranks)
            changes = find_changes(saved.get("arithmetic", {}), ranks.device)
            if changes and ranks.is_first:
                warn(f"warning: {folder}: from here on not to the same bits ({changes})")

        self.start: Start | None = None
        start_model = self._start_from_weights if job.weights and not saved else None
        self.learner = Learner(recipe, self.shards.num_classes, ranks, job.seed, job.parallel, start_model)
        streams = choose_streams(job.seed, saved, ranks)
        torch.manual_seed(streams.dropout)
        self.feed = TrainFeed(
            self.shards, self.colors, recipe, ranks,
            seed=streams.feed, epoch=int(saved["epoch"]) if saved else 1, options=job.loader,
            whole=self.learner.split.mode == "columns",
        )  # fmt: skip
        self.eval_loader = (
            make_eval_loader(self.shards, self.colors, recipe, ranks, "centre", job.loader) if has_val else None
        )
        self.step, self.epoch, self.time_s, self.best_error = 0, 1, 0.0, math.inf
        self.sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)  # of count_errors, since the last record
        self.before_evaluation: dict[str, Any] | None = None  # this rank's place after an epoch's last step
        if saved:
            self._restore(saved)
        self.first_step = self.step + 1

        after_step = self.step if folder else None
        config = make_config(job, self.shards, ranks, self.start)
        self.logger = Logger(
            ranks, job.runs, job.name, config, self.colors,
            resume=folder, step=self.step, epoch=self.epoch, voice=job.voice,
            open_board=open_board and (lambda run: open_board(run, self.shards, self.colors, recipe, after_step)),
        )  # fmt: skip
        self.saver = Saver(
            self.logger.folder / CHECKPOINTS, ranks,
            keep=job.safety.keep_checkpoints, minutes=job.safety.checkpoint_minutes, before=self.logger.sync,
            tell=self._tell_unsaved, alive=lambda: self.watchdog.beat("a piece of a checkpoint"),
        )  # fmt: skip
        skipped, parameters = saved.get("skipped", 0) if saved else 0, list(self.learner.model.parameters())
        self.guard = LossGuard(ranks, self.logger.folder, job.safety.on_nonfinite, parameters, skipped)
        self.stuck = StuckLoss(self.shards.num_classes, len(self.feed))

    def train(self) -> int:
        """Epoch after epoch. Returns the exit status."""
        recipe, logger = self.job.recipe, self.logger
        self._announce()
        progress = Progress(recipe.epochs, len(self.feed), steps_done=self.step, best_error=self.best_error)
        stopped, status = "", 0
        with choose_display(self.job.voice if self.ranks.is_first else "quiet", progress) as display:
            logger.display = display
            self.watchdog.beat("the start")
            while not self.learner.schedule.finished(self.epoch - 1):
                status = self._train_epoch() or self._end_epoch()
                if status:
                    self._save()
                    where = f"stopped after step {self.step} (epoch {self.epoch})"
                    stopped = f"{where}; go on with: {self._spell('alexnet-train', '--resume', logger.folder)}"
                    break
            self.saver.finish()
        if not stopped:
            evaluate_it = [self._spell("alexnet-eval", logger.folder)] if self.eval_loader else []
            following = ", ".join([*evaluate_it, spell_command("alexnet-report", logger.folder)])
            note(f"complete after epoch {self.epoch - 1}; next: {following}")
        logger.end(status, self.step, stopped)
        return status

    def _train_epoch(self) -> int:
        """The steps of this epoch that are left: 0, or the status of a signal."""
        self.feed.begin_epoch(self.epoch)
        self.learner.net.train()
        num_steps = len(self.feed)
        if self.feed.step == num_steps:  # resumed between an epoch's last step and its evaluation
            self.before_evaluation = self._place()
            self.feed.end_epoch()
            return 0
        batches = iter(self.feed)
        start_s, waited_s, num_images = time.perf_counter(), 0.0, 0
        while True:
            asked_s = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return 0
            waited_s += time.perf_counter() - asked_s
            in_epoch = self.feed.step
            self.learner.schedule.begin_step(self.epoch, in_epoch - 1, num_steps)
            self._step(batch)
            if self.step == self.first_step:  # now there is a velocity
                self.saver.prepare(self.learner.state_dict())
            self.logger.display.step(self.epoch, in_epoch)
            num_images += len(batch.labels) * self.ranks.world_size
            if in_epoch % LOG_STEPS == 0 or in_epoch == num_steps:
                self.saver.check()
                errors, is_save_due = self._take_sums()
                now_s = time.perf_counter()
                took_s = now_s - start_s
                self.time_s += took_s
                self._log(errors, (in_epoch - 1) % LOG_STEPS + 1, num_images / took_s, waited_s / took_s)
                start_s, waited_s, num_images = now_s, 0.0, 0
                if in_epoch == num_steps:
                    self.before_evaluation = self._place()
                elif is_save_due:
                    self._save()
            status = self.stop.status()  # every rank's: they all have come here
            self.watchdog.beat(f"step {self.step} of epoch {self.epoch}")
            if status:
                self.time_s += time.perf_counter() - start_s
                return status

    def _step(self, batch: Batch) -> None:
        """One update, and what it got wrong. Raises UserError if it does not fit into the GPU's memory."""
        self.step += 1
        guard = self.guard
        guard.begin(self.step, self.feed.keys, epoch=self.epoch, lr=self.learner.schedule.lr)
        try:
            logits = self.learner.step(batch.images, batch.labels, guard.may_update if guard.asks else None)
        except torch.OutOfMemoryError as error:
            said = explain_out_of_memory(error, self.job.recipe.global_batch_size, self.ranks.world_size)
            raise UserError(said) from error
        if guard.has_skipped:  # neither learnt from nor counted
            self.logger.event("nonfinite_skipped", step=self.step, epoch=self.epoch, total=guard.skipped)
            return
        counted = count_errors(logits, batch.labels)
        guard.saw(counted[1])
        self.sums += counted

    def _take_sums(self) -> tuple[Errors, bool]:
        """Errors since the last record, over all ranks, and whether it is time to save; the sums begin anew."""
        is_due = torch.full((1,), float(self.saver.is_due()), dtype=self.sums.dtype, device=self.sums.device)
        count, loss, wrong1, wrong5, num_due = reduce_sum(torch.cat((self.sums, is_due)), self.ranks).tolist()
        self.sums.zero_()
        each = 1 / count if count else math.nan  # all skipped
        return Errors(int(count), loss * each, 100 * wrong1 * each, 100 * wrong5 * each), num_due > 0

    def _log(self, errors: Errors, num_steps: int, images_per_s: float, data_wait_fraction: float) -> None:
        """The record of the last `num_steps` steps. Raises UserError if their loss is not finite."""
        lr = self.learner.schedule.lr
        self.logger.train(
            errors, step=self.step, epoch=self.epoch, lr=lr, images_per_s=images_per_s,
            data_wait_fraction=data_wait_fraction, time_s=self.time_s,
        )  # fmt: skip
        if not math.isfinite(errors.loss) and not self.guard.asks:
            self.guard.stop(errors.loss)
        said = self.stuck.watch(errors.loss, num_steps, lr)
        if said and self.ranks.is_first:
            warn(f"warning: {said}")
            self.logger.event("loss_stuck", step=self.step, epoch=self.epoch, text=said)

    def _end_epoch(self) -> int:
        """Evaluate and begin to save: 0. Or, where a signal comes first, its status: a resumed run evaluates anew."""
        epoch, is_best, result, top1_error = self.epoch, True, "", math.nan
        if self.eval_loader is not None:
            try:
                errors = self._evaluate()
            except _Stopped as stopped:
                return int(stopped.args[0])
            top1_error = errors.top1_error
            is_best = top1_error < self.best_error
            self.best_error = min(self.best_error, top1_error)
            best = "" if is_best else f" (best {self.best_error:.2f} %)"
            result = f"top-1 error {top1_error:.2f} %{best}, top-5 {errors.top5_error:.2f} %, "
        schedule = self.learner.schedule
        before = schedule.rate(epoch, 0, 1)
        news = schedule.end_epoch(epoch, top1_error)
        if news:
            is_cut = schedule.rate(epoch + 1, 0, 1) < before
            self.logger.event("lr_cut" if is_cut else "schedule", step=self.step, epoch=epoch, text=news)
            result += f"{news}, "
        self.logger.epoch_done(epoch, result)
        self.epoch += 1
        self.before_evaluation = None
        self._save(EPOCH, *([BEST] if is_best else []))
        self.learner.rest()
        return 0

    def _evaluate(self) -> Errors:
        """The errors on the validation images. Raises _Stopped if a signal comes."""
        assert self.eval_loader is not None
        self.logger.display.evaluating(self.epoch)
        model, dtype = self.learner.whole_model(), self.learner.dtype

        def go_on() -> None:
            self.watchdog.beat(f"a batch of the evaluation after epoch {self.epoch}")
            status = self.stop.status()  # every rank's: all have as many batches
            if status:
                raise _Stopped(status)

        num_images = self.shards.num_samples("val")
        errors = evaluate(model, self.eval_loader, self.ranks, dtype, num_images, on_batch=go_on)
        self.logger.eval(errors, self.step, self.epoch)
        self.logger.look(model, dtype, self.step)
        return errors

    def _save(self, *names: str) -> None:
        """Begin to save; the checkpoint will have `names`, too. Every rank calls it alike."""
        self.saver.wait()
        places = gather(self.before_evaluation or self._place(), self.ranks)
        learnt = self.learner.state_dict()
        state: State = {
            "model": learnt["model"],
            "optimizer": learnt["optimizer"],
            "schedule": learnt["schedule"],
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
            "arithmetic": list_arithmetic(self.ranks.device),
            "ranks": places,
        }
        self.saver.begin(state, self.step, names)

    def _place(self) -> dict[str, Any]:
        """What is this rank's own in a checkpoint."""
        random = {"cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        return {"loader": self.feed.state_dict(), "sums": self.sums.cpu(), "random": random}

    def _restore(self, saved: State) -> None:
        self.learner.load_state_dict(dict(saved))
        self.step, self.epoch = int(saved["step"]), int(saved["epoch"])
        self.time_s, self.best_error = saved["time_s"], saved["best_error"]
        if len(saved["ranks"]) != self.ranks.world_size:
            return  # an epoch begins, with the streams of choose_streams
        place = saved["ranks"][self.ranks.rank]
        self.sums.copy_(place["sums"])
        self.feed.load_state_dict(place["loader"], self.epoch)
        torch.set_rng_state(place["random"]["cpu"])
        if self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(place["random"]["cuda"])

    def _start_from_weights(self, model: AlexNet) -> None:
        assert self.job.weights is not None
        weights = load_any(self.job.weights, is_completed=False)
        self.start = start_from(model, weights, self.shards.manifest.classes)

    def _announce(self) -> None:
        recipe, ranks, logger, num_steps = self.job.recipe, self.ranks, self.logger, len(self.feed)
        precision = "bfloat16 autocast" if self.learner.dtype == torch.bfloat16 else "float32"
        mode = f", {self.learner.split.mode}" if ranks.world_size > 1 else ""
        if self.start:
            note(self.start.describe())
        note(
            f"{logger.folder}: recipe {recipe.name}, {ranks.world_size} x {ranks.device.type}, {precision}{mode}, "
            f"{num_steps} steps of {recipe.global_batch_size} images an epoch"
        )
        logger.announce(
            recipe=recipe.name, epochs=recipe.epochs, steps_per_epoch=num_steps, step=self.step,
            global_batch_size=recipe.global_batch_size, world_size=ranks.world_size, device=ranks.device.type,
        )  # fmt: skip
        if restart_count():
            note(f"restart {restart_count()}: goes on after step {self.step}")
            logger.event("restart", step=self.step, number=restart_count())

    def _spell(self, *words: object) -> str:
        """A command about this run, with those flags without which it would use other data or another device."""
        flags: list[object] = []
        if self.job.cache_dir and self.job.cache_dir != os.environ.get("ALEXNET_CACHE"):
            flags += ["--cache-dir", self.job.cache_dir]
        num_gpus = self.ranks.world_size if self.job.use_gpu else 0
        is_ours = LAUNCH_ID in os.environ or not under_launcher()
        if is_ours and num_gpus != torch.cuda.device_count():
            flags += ["--gpus", num_gpus]
        return spell_command(*words, *flags, shards=self.job.shards, usual=self.job.shards)

    def _tell_unsaved(self, step: int, what: str, kept: str) -> None:
        warn(f"warning: no checkpoint of step {step}: {what}; {kept}, training goes on and will try again")
        self.logger.event("checkpoint_failed", step=step, reason=what)


def make_config(job: Job, shards: ShardSet, ranks: Ranks, start: Start | None) -> dict[str, Any]:
    """The contents of config.json."""
    return {
        "recipe": to_dict(job.recipe),
        "seed": job.seed,
        "shards": shards.location,
        "shards_fingerprint": shards.fingerprint,
        "num_classes": shards.num_classes,
        "classes": list_classes(shards.manifest.classes),
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "feeding": {name: value for name, value in asdict(job.loader).items() if name not in _OF_THIS_MACHINE},
        "weights": start and asdict(start),
        "parallel": asdict(job.parallel),
        "safety": asdict(job.safety),
        "launch_id": launch_id(),
    }


def list_settings(job: Job, shards: ShardSet, colors: ColorStats, saved: State | None) -> dict[str, str]:
    """What has to be the same on all ranks; `saved`: the checkpoint to go on from."""
    return {
        "shards": shards.fingerprint[:12],
        "colours (SHA-256)": hashlib.sha256(colors.mean_image.tobytes()).hexdigest()[:12],
        **{f"recipe field {name}": str(value) for name, value in to_dict(job.recipe).items()},
        "--seed": str(job.seed),
        "--weights": str(job.weights),
        "--parallel": str(job.parallel),
        **{f"--{name.replace('_', '-')}": str(value) for name, value in asdict(job.safety).items()},
        "the step to resume from": str(saved["step"]) if saved else "0",
    }
