"""`maefast pretrain`: an MAE from images, by the official recipe, in a run that survives being killed."""

import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checkpoints, sharding
from ..checkpoints import Position
from ..data.pretraining import Augmented, Batch, Keys, batches, dead_workers_reported, evenly_spaced
from ..errors import UserError
from ..group import Group, joined
from ..masks import draw_noise
from ..schedule import warmup_cosine
from ..step import read_later
from ..variants import PcaTarget
from .options import Options
from .report import Log, Report, conclude, draw, show, tensorboard
from .resumable import Resumable

if TYPE_CHECKING:
    from ..data.sources import ImageDataset
LAG = {"cpu": 0, "cuda": 1}


def pretrain(options: Options, data: "ImageDataset | Callable[[], ImageDataset]") -> dict[str, Any]:
    """Train, save, log and draw to options.output_dir; SIGTERM or SIGUSR2 to any process saves at the next step and returns.

    data     the images, or what opens them, called when the processes of the run, where there are several, have found each other
    returns  the summary: epochs and steps done, loss (the last epoch's mean), images_per_second, data_wait, seconds, unreadable
             images, rewinds, checkpoint (the newest), signal (that ended the run, or 0), finished (False after a signal)
    Raises UserError before anything is written for options that do not fit each other, the images or the checkpoint to resume;
    later for a loss that is not finite, a disk that is full and a worker that died, with the newest checkpoint intact. Several
    processes raise it together.
    """
    with joined(options) as group, dead_workers_reported():
        with group.together():
            images = data() if callable(data) else data
        with _signals() as received:
            return _Run(options, images, group).train(received)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The numbers of the signals that ask to stop, as they arrive, where they can be handled: in the main thread."""
    received = list[int]()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGTERM, signal.SIGUSR2)
    before = [signal.signal(number, lambda number, frame: received.append(number)) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class _Run(Resumable):
    def __init__(self, options: Options, data: "ImageDataset", group: Group):
        super().__init__(options, data, group)
        self.unread = list[tuple[Callable[[], float], Position, float]]()  # losses of steps, where, their learning rates
        self.signal = 0  # that ended the run

    def train(self, received: list[int]) -> dict[str, Any]:
        options, main = self.options, self.group.main
        log = board = None
        with self.group.together():
            if main:
                log, board = self._open_logs()
        report = Report(options.epochs * self.steps_per_epoch, self._steps_done(), self.batch, self.device, quiet=not main)
        self._introduce(report, board is not None)
        samples = self._samples(report) if main and find_spec("matplotlib") is not None else None
        if options.fsdp:
            samples = self.group.first(samples)
        if isinstance(self.model, PcaTarget) and self.resumed is None:
            with self.group.together():
                self.model.find_components(self._evenly_spaced(self.model.images_for_components, report))
        feed, saved = self._feed(), self.at
        try:
            while self.at.epoch < options.epochs and self._step(feed, report, received):
                ended = self.at.step == self.steps_per_epoch
                if ended:
                    self._end_epoch(log, board, report, samples)
                if ended or (options.save_steps and self.at.step % options.save_steps == 0):
                    self._save(report)
                    saved = self.at
            if self.at != saved:
                self._save(report)
        finally:
            feed.close()  # ends the workers
            report.close()
            if board is not None:
                board.close()
        summary: dict[str, Any] = {"epochs": self.at.epoch, "steps": report.done, "loss": self.loss} | report.figures()
        summary |= {"unreadable": len(self.unreadable), "rewinds": self.rewinds, "checkpoint": str(self.newest)}
        summary |= {"signal": self.signal, "finished": self.at.epoch >= options.epochs}
        if main:
            conclude(summary)
        return summary

    def _open_logs(self) -> tuple[Log, Any]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_left_overs(self.folder)
            return Log(self.folder, self.at.epoch), tensorboard(self.options.log_dir or self.folder, self.at.epoch)
        except OSError as error:
            raise UserError(f"--output_dir must be a folder that can be written; {error}") from error

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
        share = (self.group.rank, self.group.size)
        keys = Keys(len(self.data), options.batch_size, per_epoch, options.seed, epochs, skip, share)
        return batches(images, keys, options.num_workers, options.pin_mem and self.device.type == "cuda")

    def _step(self, feed: Iterator[Batch], report: Report, received: list[int]) -> bool:
        """One step of the optimizer, on `accum_iter` batches of each process; False where one was told to stop instead."""
        options, rate = self.options, self._lr()
        images = self._next(feed, report, received)
        if self.signal:
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = list[Tensor]()
        self.model.train()
        for i, noise in enumerate(self._noise()):
            if i:
                images = self._next(feed, report, received)
            images, last = images.to(self.device, non_blocking=True), i == options.accum_iter - 1
            with nullcontext() if last else sharding.unsynchronised(self.forward):
                with nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast):
                    loss = self.forward(images, options.mask_ratio, noise=noise, return_pred=self.needs_pred).loss
                self.scaler.scale(loss / options.accum_iter).backward()
            losses.append(loss.detach())
        self.unread.append((read_later(self.group.mean(torch.stack(losses).mean())), self.at, rate))
        if self._read_losses(report, LAG[self.device.type]):
            if options.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        self.at = Position(self.at.epoch, self.at.step + 1)
        return True

    def _next(self, feed: Iterator[Batch], report: Report, received: list[int]) -> Tensor:
        """A batch of this process, when all have theirs. The wait is that of the slowest, for which the others wait too."""
        started, error = time.perf_counter(), None
        try:
            with dead_workers_reported():
                images, unreadable = next(feed)
        except UserError as caught:
            error = caught
        waited = time.perf_counter() - started
        number, failed, waited = self.group.most(max(received, default=0), error is not None, waited)
        if failed:
            self.group.agree(error)
        self.signal = max(self.signal, int(number))
        report.waited += waited
        self._skip(unreadable, report)
        return images

    def _noise(self) -> Tensor:
        """(accum_iter, batch_size, L): this process's rows of what is drawn for the whole step, however many processes and
        batches share it."""
        options = self.options
        noise = draw_noise(options.sampler, self.batch, self.model.patch_embed.grid_size, self.len_keep, self.masks)
        return noise.view(options.accum_iter, self.group.size, options.batch_size, -1)[:, self.group.rank]

    def _read_losses(self, report: Report, keep: int = 0) -> bool:
        """Count the losses of the steps but the last `keep`; False where one was not finite, and the weights are older ones."""
        while len(self.unread) > keep:
            read, at, rate = self.unread.pop(0)
            loss = read()
            report.step(at.epoch, loss, rate)
            if not math.isfinite(loss):
                report.done += len(self.unread)  # steps on weights that were broken
                self.unread.clear()
                self.rewind(f"loss is {loss}", at, rate, report)
                return False
            self.loss_sum, self.counted, self.loss = self.loss_sum + loss, self.counted + 1, loss
        return True

    def _skip(self, unreadable: list[str], report: Report) -> None:
        """Count what cannot be read, and name it once."""
        for line in sorted(set(unreadable) - self.unreadable):
            report.say(f"skipped {line}")
        self.unreadable.update(unreadable)

    def _gather(self, report: Report) -> None:
        """Have all that the steps so far have to tell."""
        self._read_losses(report)
        for lines in self.group.all(sorted(self.unreadable)):
            self._skip(lines, report)

    def _save(self, report: Report) -> None:
        self._gather(report)
        self.save(report)

    def _end_epoch(self, log: Log | None, board: Any, report: Report, samples: Tensor | None) -> None:
        """Tell about the epoch, then step over to the next. The record comes before the checkpoint: when the run goes on, one
        without its checkpoint is dropped, while a missing one would stay missing."""
        self._gather(report)
        epoch, rate = self.at.epoch, self.optimizer.param_groups[0]["lr"]
        self.loss = self.loss_sum / self.counted if self.counted else self.loss
        record = {"train_lr": rate, "train_loss": self.loss, "epoch": epoch} | report.figures()
        record |= {"unreadable": len(self.unreadable), "rewinds": self.rewinds}
        report.line(f"epoch {epoch} of {self.options.epochs}", self.loss, rate)
        # All have a part in it where the model is sharded.
        panel = None if samples is None else draw(self.model, samples, self.options, epoch)
        with self.group.together():
            try:
                if log is not None:
                    log.add(record)
                    if panel is not None:
                        show(panel, self.folder, epoch, board)
            except OSError as error:
                raise UserError(
                    f"{self.folder} cannot be written: {error.strerror or error}; {checkpoints.last_good(self.folder)}"
                ) from error
        if board is not None:
            for name, value in record.items():
                board.add_scalar(name, value, epoch)
        self.at, self.loss_sum, self.counted = Position(epoch + 1, 0), 0.0, 0

    def _evenly_spaced(self, count: int, report: Report) -> Iterator[Tensor]:
        """Images of the data set, the same in every epoch and every process."""
        for image, unreadable in evenly_spaced(self.data, self.model.patch_embed.img_size, count):
            self._skip(unreadable, report)
            if image is not None:
                yield image

    def _samples(self, report: Report) -> Tensor | None:
        images = list(self._evenly_spaced(self.options.pictures, report))
        return torch.stack(images).to(self.device) if images else None

    def _introduce(self, report: Report, board: bool) -> None:
        images = f"{len(self.data)} images of {self.data.channels} channels"
        pace = f"{self.steps_per_epoch} steps of {self.batch} an epoch, learning rate {self.peak:.3g}"
        processes = f" in each of {self.group.size} processes" if self.group.size > 1 else ""
        plain = "the plain " if self.options.reference else ""
        report.say(f"{plain}{self.options.model} on {self.device}{processes}: {images}, {pace}")
        if self.resumed is not None:
            report.say(f"goes on from {self.resumed}, step {self.at.step} of epoch {self.at.epoch}")
        if self.options.log_dir is not None and not board:
            report.say('no TensorBoard events: pip install "maefast[tensorboard]"')
        if self.options.pictures and find_spec("matplotlib") is None:
            report.say('no pictures: pip install "maefast[train]"')
