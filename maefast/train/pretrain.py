"""`maefast pretrain`: an MAE from images, by the official recipe, in a run that survives being killed."""

import argparse
import math
import signal
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.architecture import of_model
from . import UserError, state
from .boxes import centred
from .feed import Augmented, Batch, Keys, batches, dead_workers_reported
from .files import check_writable
from .optim import adamw
from .options import Options
from .report import Log, Report, conclude, draw, tensorboard
from .schedule import warmup_cosine
from .setup import build_model, find_device, require_one_process
from .state import Position

if TYPE_CHECKING:
    from .dataset import ImageDataset

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


def pretrain(options: Options, data: "ImageDataset") -> dict[str, Any]:
    """Train, save, log and draw to options.output_dir; SIGTERM saves at the next step and returns.

    returns  the summary: epochs and steps done, loss (the last epoch's mean), images_per_second, data_wait, seconds, unreadable
             images, checkpoint (the newest), finished (False after SIGTERM)
    Raises UserError before anything is written for options that do not fit each other, the images or the checkpoint to resume;
    later for a loss that is not finite, a disk that is full and a worker that died, with the newest checkpoint intact.
    """
    run = _Run(options, data)
    with dead_workers_reported(), _sigterm() as stopping:
        return run.train(stopping)


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where signals can be handled: in the main thread."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: stopping.set())
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)


class _Run:
    def __init__(self, options: Options, data: "ImageDataset"):
        self.options, self.data, self.folder = options, data, options.output_dir
        require_one_process()
        self.device = find_device(options.device)
        amp = options.amp or ("bf16" if self.device.type == "cuda" else "off")
        if amp == "fp16" and self.device.type != "cuda":
            raise UserError(f"--amp fp16 must run on a GPU; the device is {self.device}")
        self.autocast = DTYPES[amp]
        self.batch = options.batch_size * options.accum_iter
        self.steps_per_epoch = len(data) // self.batch
        if not self.steps_per_epoch:
            needed = f"--batch_size x --accum_iter = {self.batch} images"
            raise UserError(f"--data_path must hold at least {needed}; {options.data_path} holds {len(data)}")
        if options.start_epoch >= options.epochs:
            raise UserError(f"--start_epoch must be less than --epochs, {options.epochs}; it is {options.start_epoch}")
        self.peak = options.blr * self.batch / 256 if options.lr is None else options.lr
        self.model = build_model(options, data.channels).to(self.device)
        check_writable(self.folder, "--output_dir")

        self.optimizer = adamw(self.model, self.peak, weight_decay=options.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.masks = torch.Generator(self.device).manual_seed(options.seed)
        self.at = Position(options.start_epoch, 0)
        self.loss_sum = 0.0  # of the steps of this epoch
        self.loss = math.nan  # of the last step, or the mean of the epoch that it ended
        self.unreadable = set[str]()
        self.resumed = self._resume()

    # -- checkpoints ------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a run cannot change when it goes on."""
        facts = {f"the model's {name}": value for name, value in asdict(of_model(self.model)).items()}
        return facts | {"the number of images": len(self.data)}

    def _pace(self) -> dict[str, int]:
        """What it cannot change within an epoch, whose remaining batches would be others."""
        return {name: getattr(self.options, name) for name in ("batch_size", "accum_iter", "seed")}

    def _resume(self) -> Path | None:
        there = state.checkpoints(self.folder)
        if not self.options.resume:
            if there:
                ways = "--resume auto goes on with it, another folder starts anew"
                raise UserError(f"--output_dir must hold no earlier run; {self.folder} holds {there[-1].name}: {ways}")
            return None
        if self.options.resume == "auto" and not there:
            return None
        path = there[-1] if self.options.resume == "auto" else Path(self.options.resume)
        entries = state.read(path)
        run = entries["run"]
        if there and there[-1].resolve() != path.resolve():
            ways = "--resume auto goes on with it, another folder keeps both"
            raise UserError(f"--output_dir must hold no later run than {path}; {self.folder} holds {there[-1].name}: {ways}")
        state.must_agree(path, run["identity"], self._identity())
        if run["step"]:
            state.must_agree(path, run["pace"], self._pace())
        self.at = Position(entries["epoch"] + 1, run["step"])
        self.model.load_state_dict(entries["model"])
        try:
            self.optimizer.load_state_dict(entries["optimizer"])
        except ValueError as error:
            raise UserError(f"--resume must be a checkpoint of the same optimizer; {path} has another: {error}") from error
        for group, decay in zip(self.optimizer.param_groups, (self.options.weight_decay, 0.0), strict=True):
            group["weight_decay"] = decay
        if entries["scaler"]:
            self.scaler.load_state_dict(entries["scaler"])
        if run["masks"].numel() != self.masks.get_state().numel():
            raise UserError(f"--device must be of the kind that {path} was written on, for its masks; it is {self.device.type}")
        self.masks.set_state(run["masks"])
        self.loss_sum, self.loss = run["loss_sum"], run["loss"]
        self.unreadable.update(run["unreadable"])
        return path

    def _save(self) -> Path:
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise self._diverged("weights are not finite")
        args = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.options).items()}
        entries = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.at.epoch - 1,
            "scaler": self.scaler.state_dict(),
            "args": argparse.Namespace(**args),
            "config": asdict(of_model(self.model)),
            "run": {
                "step": self.at.step,
                "masks": self.masks.get_state(),
                "loss_sum": self.loss_sum,
                "loss": self.loss,
                "unreadable": sorted(self.unreadable),
                "identity": self._identity(),
                "pace": self._pace(),
            },
        }
        path = self.folder / self.at.file_name
        state.save(entries, path, self.options.keep)
        return path

    def _diverged(self, what: str) -> UserError:
        rate = self.optimizer.param_groups[0]["lr"]
        where = f"at step {self.at.step} of epoch {self.at.epoch}, with a learning rate of {rate:.3g}"
        hint = "a smaller --blr, --clip_grad 1 or --amp bf16 may help"
        return UserError(f"the {what} {where}; {state.last_good(self.folder)}; {hint}")

    # -- the loop ---------------------------------------------------------------------------------------

    def train(self, stopping: threading.Event) -> dict[str, Any]:
        options = self.options
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            state.remove_left_overs(self.folder)
            log = Log(self.folder, self.at.epoch)
            board = tensorboard(options.log_dir or self.folder, self.at.epoch)
        except OSError as error:
            raise UserError(f"--output_dir must be a folder that can be written; {error}") from error
        report = Report(options.epochs * self.steps_per_epoch, self._steps_done(), self.batch, self.device)
        self._introduce(report, board is not None)
        samples = self._samples(report) if find_spec("matplotlib") is not None else None
        feed, newest = self._feed(), self.resumed
        try:
            while self.at.epoch < options.epochs and not stopping.is_set():
                self._step(feed, report)
                if self.at.step == self.steps_per_epoch:
                    self._end_epoch(log, board, report, samples)
                    newest = self._save()
                elif stopping.is_set() or (options.save_steps and self.at.step % options.save_steps == 0):
                    newest = self._save()
        finally:
            feed.close()  # ends the workers
            report.close()
            if board is not None:
                board.close()
        summary: dict[str, Any] = {"epochs": self.at.epoch, "steps": report.done, "loss": self.loss} | report.figures()
        summary |= {"unreadable": len(self.unreadable), "checkpoint": str(newest), "finished": self.at.epoch >= options.epochs}
        conclude(summary)
        return summary

    def _steps_done(self) -> int:
        return self.at.epoch * self.steps_per_epoch + self.at.step

    def _lr(self) -> float:
        """Of the next step. A warm-up longer than the run rises to its end, as in the official code."""
        options = self.options
        warmup = options.warmup_epochs * self.steps_per_epoch
        steps = max(options.epochs * self.steps_per_epoch, warmup)
        return warmup_cosine(self._steps_done(), steps, warmup, self.peak, options.min_lr)

    def _feed(self) -> Generator[Batch]:
        options = self.options
        flip = options.augment != "none" if options.flip is None else options.flip
        images = Augmented(self.data, self.model.patch_embed.img_size, options.augment, flip, options.seed)
        epochs, accumulated = range(self.at.epoch, options.epochs), options.accum_iter
        per_epoch, skip = self.steps_per_epoch * accumulated, self.at.step * accumulated
        keys = Keys(len(self.data), options.batch_size, per_epoch, options.seed, epochs, skip)
        return batches(images, keys, options.num_workers, options.pin_mem and self.device.type == "cuda")

    def _step(self, feed: Iterator[Batch], report: Report) -> None:
        """One step of the optimizer, on `accum_iter` batches."""
        options, rate = self.options, self._lr()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = list[Tensor]()
        self.model.train()
        for _ in range(options.accum_iter):
            waiting = time.perf_counter()
            images, unreadable = next(feed)
            report.waited += time.perf_counter() - waiting
            self._skip(unreadable, report)
            images = images.to(self.device, non_blocking=True)
            noise = torch.rand(len(images), self.model.patch_embed.num_patches, device=self.device, generator=self.masks)
            with nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast):
                loss = self.model(images, options.mask_ratio, noise=noise, return_pred=False).loss
            self.scaler.scale(loss / options.accum_iter).backward()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            raise self._diverged(f"loss is {mean}")
        if options.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.loss_sum += mean
        report.step(self.at.epoch, mean, rate)
        self.loss = mean
        self.at = Position(self.at.epoch, self.at.step + 1)

    def _skip(self, unreadable: list[str], report: Report) -> None:
        """Count what cannot be read, and name it once."""
        for line in sorted(set(unreadable) - self.unreadable):
            report.say(f"skipped {line}")
        self.unreadable.update(unreadable)

    def _end_epoch(self, log: Log, board: Any, report: Report, samples: Tensor | None) -> None:
        """Tell about the epoch, then step over to the next. The record comes before the checkpoint: when the run goes on, one
        without its checkpoint is dropped, while a missing one would stay missing."""
        epoch, rate, self.loss = self.at.epoch, self.optimizer.param_groups[0]["lr"], self.loss_sum / self.steps_per_epoch
        record = {"train_lr": rate, "train_loss": self.loss, "epoch": epoch} | report.figures()
        record["unreadable"] = len(self.unreadable)
        report.line(f"epoch {epoch} of {self.options.epochs}", self.loss, rate)
        try:
            log.add(record)
            if samples is not None:
                draw(self.model, samples, self.options.mask_ratio, self.options.seed, epoch, self.folder)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written: {error.strerror or error}; {state.last_good(self.folder)}"
            ) from error
        if board is not None:
            for name, value in record.items():
                board.add_scalar(name, value, epoch)
        self.at, self.loss_sum = Position(epoch + 1, 0), 0.0

    def _samples(self, report: Report) -> Tensor | None:
        """Evenly spaced images, the same in every epoch and every process; those that cannot be read are left out."""
        images, size = list[Tensor](), self.model.patch_embed.img_size
        for index in torch.linspace(0, len(self.data) - 1, min(self.options.pictures, len(self.data))).long().tolist():
            try:
                images.append(self.data.read(index, size, partial(centred, size=size)))
            except UserError as error:
                self._skip([str(error)], report)
        return torch.stack(images).to(self.device) if images else None

    def _introduce(self, report: Report, board: bool) -> None:
        images = f"{len(self.data)} images of {self.data.channels} channels"
        pace = f"{self.steps_per_epoch} steps of {self.batch} an epoch, learning rate {self.peak:.3g}"
        report.say(f"{self.options.model} on {self.device}: {images}, {pace}")
        if self.resumed is not None:
            report.say(f"goes on from {self.resumed}, step {self.at.step} of epoch {self.at.epoch}")
        if self.options.log_dir is not None and not board:
            report.say('no TensorBoard events: pip install "maefast[tensorboard]"')
        if self.options.pictures and find_spec("matplotlib") is None:
            report.say('no pictures: pip install "maefast[train]"')
