"""A run put together: what is trained, what feeds it, how far it is; and all its future depends on, as a checkpoint.

The decision that shaped it: whatever can be wrong with a job is found here, before the first step. A checkpoint holds
weights, velocity, schedule, and of each rank the loader's state, the random state and the sums not yet logged; weights
and velocity whole, whatever the ranks hold, so that any of them can go on. Left out: the steps (train.py), which
checkpoint to go on from (resume.py), how one is written (saving.py, checkpoint.py).
"""

import math
from pathlib import Path
from typing import Any

import torch

from pipeline.colors import ColorStats
from pipeline.common.console import warn
from pipeline.common.errors import UserError
from pipeline.shards import ShardSet
from trainer.config import Job
from trainer.data import TrainFeed
from trainer.distributed import Ranks, check_alike, gather
from trainer.evaluate import make_eval_loader
from trainer.lossguard import LossGuard, StuckLoss
from trainer.model import AlexNet
from trainer.nets.finetune import Start, start_from
from trainer.nets.formats import load_any
from trainer.parallel import check as check_parallel
from trainer.recipe import to_dict
from trainer.record.logger import Journal
from trainer.record.runs import BEST, CHECKPOINTS
from trainer.report.tensorboard import Board, open_board
from trainer.resume import check_resumable, choose_streams, find_resumed, load_resumed
from trainer.runfacts import describe, get_random_state, list_arithmetic, list_facts, name_changes, set_random_state
from trainer.saving import Saver, list_steps
from trainer.step import Learner
from trainer.watchdog import Watchdog


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
