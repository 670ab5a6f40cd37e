"""The training loop: epochs of steps, an evaluation and a checkpoint after each, resumable to the same numbers.

The decision that shaped it: everything a run's future depends on stands in one checkpoint (weights, velocity, schedule,
and of each rank the loader's state, the random state and the sums not yet logged), written between two steps. Nothing
waits for the device within a step: sums stay there until a record is due. Left out: flags (cli.py), the network, the
update rule and the record keeping, each in a file of its own.
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pipeline.colorstats import ColorStats
from pipeline.console import note
from pipeline.errors import UserError
from pipeline.feeding import DecodeOption
from pipeline.graph import stream_seed
from pipeline.loader import TrainLoader
from pipeline.shardset import ShardSet, write_json
from trainer import checkpoint
from trainer.distributed import Ranks, StopRequest, gather, join, reduce_sum
from trainer.evaluate import Errors, choose_dtype, count_errors, evaluate, make_eval_loader
from trainer.model import AlexNet
from trainer.optim import make_optimizer, make_schedule
from trainer.recipe import Recipe, to_dict
from trainer.runlog import (
    BEST,
    CHECKPOINTS,
    ENVIRONMENT,
    LAST,
    METRICS,
    MetricsLog,
    TrainDisplay,
    create_run,
    environment,
    write_config,
)
from trainer.weights import list_classes

LOG_STEPS = 20  # a record every so many steps, and at the end of each epoch


@dataclass(frozen=True)
class Feeding:
    """Where images are decoded and kept: arguments of pipeline.TrainLoader. Samples and draws do not depend on it."""

    decode: DecodeOption = "auto"
    host_share: float | None = None
    hw_decoder_load: float = 0.9
    cache: Literal["raw"] | None = None
    prefetch_batches: int = 2


@dataclass(frozen=True)
class Job:
    """One run as asked for. `resume`: the run folder to go on with, else a new one is made under `runs`.

    `shards`: a folder or a URL; `cache_dir`, `cache_gib`: see ShardSet.open.
    """

    shards: str
    runs: Path
    name: str
    recipe: Recipe
    seed: int
    use_gpu: bool
    resume: Path | None = None
    num_threads: int | None = None
    cache_dir: str | None = None
    cache_gib: float | None = None
    feeding: Feeding = Feeding()


def run_rank(job: Job) -> int:
    """The whole run as seen by one rank. Returns the exit status: 0, or 130/143 when stopped by a signal."""
    with join(job.use_gpu) as ranks, StopRequest(ranks) as stop:
        run = _Run(job, ranks)
        try:
            return run.train(stop)
        finally:
            run.close()


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> Tensor:
    """Forward, backward, update (paper, section 5: the gradient averaged over the batch). Returns the logits."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(images)
        loss = functional.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logits


def make_train_loader(
    shards: ShardSet,
    colors: ColorStats,
    recipe: Recipe,
    ranks: Ranks,
    seed: int = 0,
    num_threads: int | None = None,
    feeding: Feeding = Feeding(),
) -> TrainLoader:
    return TrainLoader(
        shards,
        colors,
        global_batch_size=recipe.global_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        device=ranks.feed,
        mean=recipe.mean,
        lighting=recipe.lighting,
        crop=recipe.crop,
        flip=recipe.flip,
        unit_variance=recipe.unit_variance,
        layout="NHWC",
        seed=seed,
        num_threads=num_threads,
        decode=feeding.decode,
        host_share=feeding.host_share,
        hw_decoder_load=feeding.hw_decoder_load,
        cache=feeding.cache,
        prefetch_batches=feeding.prefetch_batches,
    )


class _Run:
    """A run in progress: what is trained, what feeds it, how far it is."""

    def __init__(self, job: Job, ranks: Ranks) -> None:
        self.job, self.ranks, recipe = job, ranks, job.recipe
        self.shards = ShardSet.open(job.shards, cache_dir=job.cache_dir, cache_gib=job.cache_gib)
        self.colors = ColorStats.load(self.shards.root, self.shards.fingerprint)
        self.has_val = self.shards.num_samples("val") > 0
        if not self.has_val and recipe.schedule == "plateau":
            raise UserError(
                f"{self.shards.root}: no validation images, but recipe {recipe.name} cuts its rate when their error "
                "stalls; shard a source with val/, or use --set schedule=cosine"
            )
        saved = checkpoint.load(job.resume / CHECKPOINTS / LAST) if job.resume else None
        if saved:
            self._check_resumable(saved)
        self.dtype = choose_dtype(recipe.precision, ranks.device)
        self.model = AlexNet.from_recipe(recipe, self.shards.num_classes, seed=job.seed)
        self.model.to(ranks.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.model, recipe)
        self.schedule = make_schedule(recipe, self.optimizer)
        self.step, self.epoch, self.time_s, self.best_error = 0, 1, 0.0, math.inf
        self._summary = ""
        self.sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
        torch.manual_seed(stream_seed(job.seed, "dropout", ranks.rank))  # towers of one net, but noise of one's own
        if saved:
            self.epoch = int(saved["epoch"])
        self.lighting = self._lighting(self.epoch)
        self.loader = self._make_loader()
        if saved:
            self._restore(saved)
        self.net: nn.Module = self.model
        if ranks.world_size > 1:
            on = [ranks.device] if ranks.device.type == "cuda" else None
            self.net = DistributedDataParallel(self.model, device_ids=on, gradient_as_bucket_view=True)
        self.eval_loader = (
            make_eval_loader(self.shards, self.colors, recipe, ranks, "centre", job.num_threads)
            if self.has_val
            else None
        )
        self.log: MetricsLog | None = None
        self.folder = job.resume or Path()
        if ranks.is_first:
            self._open_folder()
        self.folder = gather(self.folder, ranks)[0]
        if saved and saved["is_best"]:  # killed between saving and marking, perhaps
            self._mark_best()

    def _lighting(self, epoch: int) -> Literal["paper", "original"] | None:
        off = self.job.recipe.lighting_off_epoch
        return None if off is not None and epoch >= off else self.job.recipe.lighting

    def _make_loader(self) -> TrainLoader:
        recipe, seed = replace(self.job.recipe, lighting=self.lighting), self.job.seed
        if recipe != self.job.recipe:  # another graph begins its streams anew: it must not repeat the first epochs
            seed = stream_seed(seed, "no lighting")
        job = self.job
        return make_train_loader(self.shards, self.colors, recipe, self.ranks, seed, job.num_threads, job.feeding)

    def _open_folder(self) -> None:
        if not self.job.resume:
            self.folder = create_run(self.job.runs, self.job.name)
            config = {
                "recipe": to_dict(self.job.recipe),
                "seed": self.job.seed,
                "shards": self.shards.location,
                "shards_fingerprint": self.shards.fingerprint,
                "num_classes": self.shards.num_classes,
                "classes": list_classes(self.shards.manifest.classes),
                "world_size": self.ranks.world_size,
                "device": self.ranks.device.type,
                "feeding": asdict(self.job.feeding),
            }
            self.colors.save(self.folder)  # with the names above: the net can be used without its shards
            write_config(self.folder, config)
        write_json(self.folder / ENVIRONMENT, environment())
        self.log = MetricsLog.open(self.folder / METRICS, self.step if self.job.resume else None)

    def train(self, stop: StopRequest) -> int:
        recipe, steps_per_epoch = self.job.recipe, len(self.loader)
        precision = "bfloat16 autocast" if self.dtype == torch.bfloat16 else "float32"
        if self.ranks.is_first:
            where = f"{self.ranks.world_size} x {self.ranks.device.type}, {precision}"
            steps = f"{steps_per_epoch} steps of {recipe.global_batch_size} images an epoch"
            note(f"{self.folder}: recipe {recipe.name}, {where}, {steps}")
        with TrainDisplay(recipe.epochs, steps_per_epoch, steps_done=self.step) as display:
            while not self.schedule.finished(self.epoch - 1):
                status = self._train_epoch(stop, display if self.ranks.is_first else None)
                if status:
                    self._save()
                    if self.ranks.is_first:
                        note(
                            f"stopped after step {self.step} (epoch {self.epoch}); "
                            f"go on with: alexnet-train --resume {self.folder}"
                        )
                    return status
                self._end_epoch(display if self.ranks.is_first else None)
        return 0

    def _train_epoch(self, stop: StopRequest, display: TrainDisplay | None) -> int:
        if self._lighting(self.epoch) != self.lighting:
            self.lighting = self._lighting(self.epoch)
            del self.loader  # with its cache, if it has one: the next one asks for as much memory
            self.loader = self._make_loader()
        self.net.train()
        num_steps, batches = len(self.loader), iter(self.loader)
        since_s, waited_s, num_timed = time.perf_counter(), 0.0, 0
        while True:
            asked_s = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return 0
            waited_s += time.perf_counter() - asked_s
            in_epoch = self.loader.step
            self.schedule.begin_step(self.epoch, in_epoch - 1, num_steps)
            logits = train_step(self.net, self.optimizer, batch.images, batch.labels, self.dtype)
            self.sums += count_errors(logits, batch.labels)
            self.step += 1
            num_timed += len(batch.labels) * self.ranks.world_size
            if in_epoch % LOG_STEPS == 0 or in_epoch == num_steps:
                record = self._take_sums()
                now_s = time.perf_counter()
                took_s = now_s - since_s
                self.time_s += took_s
                rate, waited = num_timed / took_s, waited_s / took_s
                since_s, waited_s, num_timed = now_s, 0.0, 0
                self._record(in_epoch, record, rate, waited, display)
            status = stop.status()
            if status:
                self.time_s += time.perf_counter() - since_s
                return status

    def _take_sums(self) -> Errors:
        """What was summed since the last record, over all ranks; the sums begin anew."""
        count, loss, wrong1, wrong5 = reduce_sum(self.sums, self.ranks).tolist()
        self.sums.zero_()
        return Errors(int(count), loss / count, 100 * wrong1 / count, 100 * wrong5 / count)

    def _record(self, in_epoch: int, got: Errors, rate: float, waited: float, display: TrainDisplay | None) -> None:
        if self.log and display:
            self.log.train(
                step=self.step,
                epoch=self.epoch,
                loss=got.loss,
                top1_error=got.top1_error,
                top5_error=got.top5_error,
                lr=self.schedule.lr,
                images_per_s=rate,
                data_wait_fraction=waited,
                time_s=self.time_s,
            )
            display.step(
                self.epoch,
                in_epoch,
                images_per_s=rate,
                data_wait_fraction=waited,
                loss=got.loss,
                top1_error=got.top1_error,
            )
            self._summary = f"training loss {got.loss:.3f}, {rate:,.0f} images/s, waiting for data {100 * waited:.0f} %"
        if not math.isfinite(got.loss):
            raise UserError(
                f"training loss is {got.loss} after step {self.step}, expected a finite number; the last checkpoint is "
                "kept: try a lower --lr"
            )

    def _end_epoch(self, display: TrainDisplay | None) -> None:
        epoch, is_best, result = self.epoch, True, ""
        if self.eval_loader is not None:
            num_images = self.shards.num_samples("val")
            errors = evaluate(self.model, self.eval_loader, self.ranks, self.dtype, num_images)
            is_best = errors.top1_error < self.best_error
            self.best_error = min(self.best_error, errors.top1_error)
            if self.log:
                self.log.eval(step=self.step, epoch=epoch, crops="centre", **asdict(errors))
            best = "" if is_best else f" (best {self.best_error:.2f} %)"
            result = f"top-1 error {errors.top1_error:.2f} %{best}, top-5 {errors.top5_error:.2f} %, "
            cut_before = self.schedule.rate(epoch, 0, 1)
            news = self.schedule.end_epoch(epoch, errors.top1_error)
            if news and self.log:
                is_cut = self.schedule.rate(epoch + 1, 0, 1) < cut_before
                name = "lr_cut" if is_cut else "schedule"
                self.log.event(name, step=self.step, epoch=epoch, text=news)
            result += f"{news}, " if news else ""
        if display:
            display.epoch_done(epoch, result + self._summary)
        self.epoch += 1
        self._save(is_best)
        if is_best:
            self._mark_best()

    def _mark_best(self) -> None:
        if self.ranks.is_first:
            folder = self.folder / CHECKPOINTS
            checkpoint.link(folder / LAST, folder / BEST)

    def _save(self, is_best: bool = False) -> None:
        mine = {"loader": self.loader.state_dict(), "sums": self.sums.cpu(), "random": _random_state(self.ranks)}
        states = gather(mine, self.ranks)
        if self.log:
            self.log.sync()
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "recipe": to_dict(self.job.recipe),
                "num_classes": self.shards.num_classes,
                "shards_fingerprint": self.shards.fingerprint,
                "seed": self.job.seed,
                "step": self.step,
                "epoch": self.epoch,
                "time_s": self.time_s,
                "best_error": self.best_error,
                "is_best": is_best,
                "ranks": states,
            }
            checkpoint.save(self.folder / CHECKPOINTS / LAST, state)

    def _check_resumable(self, saved: dict[str, Any]) -> None:
        if len(saved["ranks"]) != self.ranks.world_size:
            raise UserError(
                f"{self.job.resume}: was trained on {len(saved['ranks'])} ranks, got {self.ranks.world_size}; "
                "resume with as many"
            )
        if saved["shards_fingerprint"] != self.shards.fingerprint:
            raise UserError(
                f"{self.job.resume}: was trained on shards {saved['shards_fingerprint'][:12]}, {self.shards.root} "
                f"holds {self.shards.fingerprint[:12]}; name the run's own with --shards"
            )

    def _restore(self, saved: dict[str, Any]) -> None:
        mine = saved["ranks"][self.ranks.rank]
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.step, self.time_s, self.best_error = int(saved["step"]), saved["time_s"], saved["best_error"]
        self.sums.copy_(mine["sums"])
        if self._lighting(self.epoch) == self._lighting(self.epoch - 1) or mine["loader"]["step"]:
            self.loader.load_state_dict(mine["loader"])  # else: a new graph begins with this epoch
        torch.set_rng_state(mine["random"]["cpu"])
        if self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(mine["random"]["cuda"])

    def close(self) -> None:
        if self.log:
            self.log.close()


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state
