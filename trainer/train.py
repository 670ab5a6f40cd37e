"""One run, from the shards to the last checkpoint: set up, step, log, evaluate, save."""

import hashlib
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.colors import ColorStats
from pipeline.common.console import set_voice, warn
from pipeline.common.errors import UserError
from pipeline.loader import Batch
from pipeline.shards import ShardSet
from trainer.checkpoint import EPOCH, Saver, check_resumable, choose_streams, find_resumed, list_steps, load_resumed
from trainer.config import LOG_STEPS, Job
from trainer.data import TrainFeed
from trainer.distributed import Ranks, check_alike, gather, join, launch_id, reduce_sum, restart_count
from trainer.evaluate import Errors, count_errors, evaluate, make_eval_loader
from trainer.kernels.native import load_native
from trainer.model import AlexNet
from trainer.nets.finetune import Start, start_from
from trainer.nets.formats import load_any
from trainer.nets.weights import list_classes
from trainer.parallel import check as check_parallel
from trainer.recipe import to_dict
from trainer.record.logger import Journal
from trainer.record.progress import Tally, choose_display
from trainer.record.runs import BEST, CHECKPOINTS
from trainer.report.tensorboard import Board, open_board
from trainer.safety import LossGuard, StopRequest, StuckLoss, Watchdog
from trainer.step import Learner, explain_out_of_memory

_OF_THIS_MACHINE = ("num_threads", "num_local_ranks")


def describe(job: Job, shards: ShardSet, ranks: Ranks, started_from: Start | None) -> dict[str, Any]:
    """For config.json."""
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
        "weights": started_from and asdict(started_from),
        "parallel": asdict(job.parallel),
        "safety": asdict(job.safety),
        "launch_id": launch_id(),
    }


def list_facts(job: Job, shards: ShardSet, colors: ColorStats, saved: dict[str, Any] | None) -> dict[str, str]:
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


def list_arithmetic(ranks: Ranks) -> dict[str, str]:
    """What the last bits of a step depend on besides weights, samples and draws; of a GPU nothing, whose bits vary."""
    if ranks.device.type == "cuda":
        return {}
    return {
        "torch": str(torch.__version__),
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "LRN": "torch's operations" if load_native() is None else "compiled C",
    }


def name_changes(before: dict[str, str], ranks: Ranks) -> str:
    """How the arithmetic of a resumed run differs from `before`, in words; empty if it does not."""
    now = list_arithmetic(ranks)
    changed = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name}: {before[name]} before, {now[name]} now" for name in changed)


def get_random_state(ranks: Ranks) -> dict[str, Tensor]:
    """Of this rank: torch's on the CPU, and on its GPU."""
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], ranks: Ranks) -> None:
    """As `get_random_state` gave it."""
    torch.set_rng_state(state["cpu"])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])


class Run:
    """A run in progress, on one rank."""

    def __init__(self, job: Job, ranks: Ranks, watchdog: Watchdog) -> None:
        self.job, self.ranks, self.watchdog, recipe = job, ranks, watchdog, job.recipe
        check_parallel(job.parallel.mode, recipe, ranks.world_size)
        self.resume = find_resumed(job, ranks)
        self.shards = ShardSet.open(job.shards, cache_dir=job.cache_dir)
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
            options=job.loader,
            whole=self.learner.split.mode == "columns",
        )
        if saved:
            self._restore(saved)
        self.eval_loader = (
            make_eval_loader(self.shards, self.colors, recipe, ranks, "centre", job.loader) if self.has_val else None
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

    def place(self) -> dict[str, Any]:
        """What is this rank's own in a checkpoint."""
        return {"loader": self.feed.state_dict(), "sums": self.sums.cpu(), "random": get_random_state(self.ranks)}

    def save(self, *names: str) -> None:
        """Begin to save; the checkpoint will have `names`, too."""
        self.saver.wait()
        mine = self.before_evaluation or self.place()
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


def run_rank(job: Job) -> int:
    """The whole run as seen by one rank. Returns the exit status: 0, or 129/130/143 when stopped by a signal."""
    set_voice(job.voice)
    timeout_s = job.safety.timeout_s
    with (
        join(job.use_gpu, timeout_s) as ranks,
        StopRequest(ranks) as stop,
        Watchdog(ranks, timeout_s) as watchdog,
    ):
        run = Run(job, ranks, watchdog)
        try:
            return _train(run, stop)
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


def _train(run: Run, stop: StopRequest) -> int:
    recipe, steps_per_epoch = run.job.recipe, len(run.feed)
    precision = "bfloat16 autocast" if run.learner.dtype == torch.bfloat16 else "float32"
    where = f"{run.ranks.world_size} x {run.ranks.device.type}, {precision}"
    if run.ranks.world_size > 1:
        where = f"{where}, {run.learner.split.mode}"
    steps = f"{steps_per_epoch} steps of {recipe.global_batch_size} images an epoch"
    if run.started_from:
        run.journal.say(run.started_from.describe())
    run.journal.say(f"{run.journal.folder}: recipe {recipe.name}, {where}, {steps}")
    run.journal.announce(
        recipe=recipe.name, epochs=recipe.epochs, steps_per_epoch=steps_per_epoch, step=run.step,
        global_batch_size=recipe.global_batch_size, world_size=run.ranks.world_size,
        device=run.ranks.device.type,
    )  # fmt: skip
    if restart_count():
        run.journal.say(f"restart {restart_count()}: goes on after step {run.step}")
        run.journal.event("restart", step=run.step, number=restart_count())
    tally = Tally(recipe.epochs, steps_per_epoch, steps_done=run.step, best_error=run.best_error)
    stopped, status = "", 0
    with choose_display(run.job.voice if run.ranks.is_first else "quiet", tally) as display:
        run.journal.show(display)
        run.watchdog.beat("the start")
        while not run.learner.schedule.finished(run.epoch - 1):
            status = _train_epoch(run, stop) or _end_epoch(run, stop)
            if status:
                run.save()
                where = f"stopped after step {run.step} (epoch {run.epoch})"
                stopped = f"{where}; go on with: alexnet-train --resume {run.journal.folder}"
                break
        run.saver.finish()
    if not stopped:
        which = "alexnet-eval {0}, alexnet-report {0}" if run.has_val else "alexnet-report {0}"
        run.journal.say(f"complete after epoch {run.epoch - 1}; next: {which.format(run.journal.folder)}")
    run.journal.end(status, run.step, stopped)
    return status


def _train_epoch(run: Run, stop: StopRequest) -> int:
    run.feed.begin_epoch(run.epoch)
    run.learner.net.train()
    num_steps = len(run.feed)
    if run.feed.step == num_steps:  # resumed between an epoch's last step and its evaluation
        run.before_evaluation = run.place()
        run.feed.end_epoch()
        return 0
    batches = iter(run.feed)
    since_s, waited_s, num_timed = time.perf_counter(), 0.0, 0
    while True:
        asked_s = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return 0
        waited_s += time.perf_counter() - asked_s
        in_epoch = run.feed.step
        run.learner.schedule.begin_step(run.epoch, in_epoch - 1, num_steps)
        _learn(run, batch)
        if not run.is_prepared:  # after a step, when there is a velocity
            run.saver.prepare(run.learner.state_dict())
            run.is_prepared = True
        run.journal.stepped(run.epoch, in_epoch)
        num_timed += len(batch.labels) * run.ranks.world_size
        if in_epoch % LOG_STEPS == 0 or in_epoch == num_steps:
            run.saver.check()
            record, is_due = _take_sums(run, run.saver.is_due())
            now_s = time.perf_counter()
            took_s = now_s - since_s
            run.time_s += took_s
            num_logged = (in_epoch - 1) % LOG_STEPS + 1
            _record(run, record, num_logged, num_timed / took_s, waited_s / took_s)
            since_s, waited_s, num_timed = now_s, 0.0, 0
            if in_epoch == num_steps:
                run.before_evaluation = run.place()
            if is_due and in_epoch < num_steps:
                run.save()
        status = stop.status()  # every rank's: they all have come here
        run.watchdog.beat(f"step {run.step} of epoch {run.epoch}")
        if status:
            run.time_s += time.perf_counter() - since_s
            return status


def _learn(run: Run, batch: Batch) -> None:
    run.step, guard = run.step + 1, run.guard
    guard.begin(run.step, run.feed.keys, epoch=run.epoch, lr=run.learner.schedule.lr)
    try:
        logits = run.learner.step(batch.images, batch.labels, guard.may_update if guard.asks else None)
    except torch.OutOfMemoryError as error:
        said = explain_out_of_memory(error, run.job.recipe.global_batch_size, run.ranks.world_size)
        raise UserError(said) from error
    if guard.has_skipped:  # neither learnt from nor counted
        run.journal.event("nonfinite_skipped", step=run.step, epoch=run.epoch, total=guard.skipped)
        return
    counted = count_errors(logits, batch.labels)
    guard.saw(counted[1])
    run.sums += counted


def _take_sums(run: Run, wish: bool) -> tuple[Errors, bool]:
    """What was summed since the last record, over all ranks, and whether any has a wish; the sums begin anew."""
    asked = torch.full((1,), float(wish), dtype=run.sums.dtype, device=run.sums.device)
    *sums, num_wishes = reduce_sum(torch.cat((run.sums, asked)), run.ranks).tolist()
    count, loss, wrong1, wrong5 = sums
    run.sums.zero_()
    each = 1 / count if count else math.nan  # all skipped
    return Errors(int(count), loss * each, 100 * wrong1 * each, 100 * wrong5 * each), num_wishes > 0


def _record(run: Run, got: Errors, num_steps: int, rate: float, waited: float) -> None:
    run.journal.train(
        got,
        step=run.step,
        epoch=run.epoch,
        lr=run.learner.schedule.lr,
        images_per_s=rate,
        data_wait_fraction=waited,
        time_s=run.time_s,
    )
    if not math.isfinite(got.loss) and not run.guard.asks:
        run.guard.stop(got.loss)
    said = run.stuck.watch(got.loss, num_steps, run.learner.schedule.lr)
    if said and run.ranks.is_first:
        warn(f"warning: {said}")
        run.journal.event("loss_stuck", step=run.step, epoch=run.epoch, text=said)


def _end_epoch(run: Run, stop: StopRequest) -> int:
    """Evaluate and begin to save: 0. Or, where a signal comes first, its status: a resumed run evaluates anew."""
    epoch, is_best, result, top1_error = run.epoch, True, "", math.nan
    if run.eval_loader is not None:
        run.journal.evaluating(epoch)
        num_images = run.shards.num_samples("val")
        model, dtype = run.learner.whole_model(), run.learner.dtype

        def go_on() -> None:
            run.watchdog.beat(f"a batch of the evaluation after epoch {epoch}")
            status = stop.status()  # every rank's: all have as many batches
            if status:
                raise _Stopped(status)

        try:
            errors = evaluate(model, run.eval_loader, run.ranks, dtype, num_images, on_batch=go_on)
        except _Stopped as stopped:
            return stopped.status
        top1_error = errors.top1_error
        is_best = top1_error < run.best_error
        run.best_error = min(run.best_error, top1_error)
        run.journal.eval(errors, run.step, epoch)
        run.journal.look(model, dtype, run.step)
        best = "" if is_best else f" (best {run.best_error:.2f} %)"
        result = f"top-1 error {top1_error:.2f} %{best}, top-5 {errors.top5_error:.2f} %, "
    result += _end_schedule(run, epoch, top1_error)
    run.journal.epoch_done(epoch, result)
    run.epoch += 1
    run.before_evaluation = None
    run.save(EPOCH, *([BEST] if is_best else []))
    run.learner.rest()
    return 0


def _end_schedule(run: Run, epoch: int, top1_error: float) -> str:
    """What the schedule makes of the epoch, recorded; for its line. Only a plateau looks at the error."""
    schedule = run.learner.schedule
    before = schedule.rate(epoch, 0, 1)
    news = schedule.end_epoch(epoch, top1_error)
    if not news:
        return ""
    is_cut = schedule.rate(epoch + 1, 0, 1) < before
    run.journal.event("lr_cut" if is_cut else "schedule", step=run.step, epoch=epoch, text=news)
    return f"{news}, "
