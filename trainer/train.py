"""The training loop: epochs of steps, an evaluation and a checkpoint after each, resumable to the same numbers.

The decision that shaped it: between two steps all ranks decide together whether to save or to stop. Nothing waits for
the device within a step: sums stay there until a record is due. Left out: flags (cli.py), what is put together and
saved (run.py), what learns (learner.py), what is read (feed.py), what is written (journal.py).
"""

import math
import time

import torch

from pipeline.common.console import set_voice, warn
from pipeline.common.errors import UserError
from pipeline.loader import Batch
from trainer.config import LOG_STEPS, Job
from trainer.distributed import join, reduce_sum, restart_count
from trainer.evaluate import Errors, count_errors, evaluate
from trainer.memory import GpuMeter
from trainer.record.progress import choose_display
from trainer.record.runs import BEST
from trainer.record.tally import Tally
from trainer.resume import EPOCH
from trainer.run import Run
from trainer.signals import StopRequest
from trainer.watchdog import Watchdog


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
    except torch.OutOfMemoryError:
        logits = None  # outside of this clause, which holds on to what the step has made
    if logits is None:
        raise UserError(run.learner.explain_out_of_memory(batch.images, batch.labels, GpuMeter()))
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
