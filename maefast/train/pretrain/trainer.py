"""`maefast pretrain`: training of an MAE by the official recipe, in a run that can be resumed."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ...ops import len_keep, random_masking
from ..baseline import reference_on
from ..checkpoints import Position
from ..data.floats import fill_missing, in_unit_of
from ..data.pretraining import Augmented, Batch, Keys, Unreadable, dead_workers_reported, evenly_spaced, load_batches
from ..data.sources import ImageDataset
from ..device import find_device
from ..errors import UserError
from ..files import check_writable
from ..group import Group, connected
from ..launch import find_launch
from ..masks import draw_noise
from ..optim import adamw
from ..schedule import warmup_cosine
from ..sharding import no_sync, replicate, shard_model
from ..step import GraphedStep, undone_on_error
from ..variants import PcaTarget
from .build import build_model, check_graph, check_options, check_values, find_autocast, init_model
from .journal import Journal, draw
from .losses import Losses
from .options import Options
from .report import Report, conclude
from .saver import Saver
from .signals import stop_signals
from .state import RunState


def pretrain(options: Options, data: ImageDataset | Callable[[], ImageDataset]) -> dict[str, Any]:
    """Train, and write checkpoints, log and pictures to options.output_dir. After SIGTERM or
    SIGUSR2 to any process, the run saves at the next step and returns.

    data     the images, or a function that opens them after the processes are connected
    returns  the summary: epochs and steps done, loss (mean of the last epoch), images_per_second,
             data_wait, seconds, unreadable images, rewinds, checkpoint (the newest), signal (that
             ended the run, or 0), finished (False after a signal)
    All processes raise UserError together: before anything is written, for options that do not fit;
    later for a loss that is not finite, a full disk and a dead worker, with a checkpoint intact.
    """
    launch = find_launch(**{name: getattr(options, name) for name in ("world_size", "local_rank", "dist_on_itp", "dist_url")})
    with connected(launch) as group, dead_workers_reported():
        with group.together():
            images = data() if callable(data) else data
        with stop_signals() as received:
            return Trainer(options, images, group).train(received)


class Trainer:
    """The training loop of a run, in one of its processes."""

    def __init__(self, options: Options, data: ImageDataset, group: Group):
        """Raises UserError in all processes, before anything is written, if options do not fit."""
        self.options, self.data, self.group = options, data, group
        self.batch = options.batch_size * options.accum_iter * group.world_size  # images per step
        self.steps_per_epoch = len(data) // self.batch
        self.peak = options.blr * self.batch / 256 if options.lr is None else options.lr
        path = None
        with group.together():
            check_options(options, group, self.batch, len(data))
            self.device = find_device(options.device, group.local_rank)
            if options.graph:
                check_graph(self.device)
            self.autocast = find_autocast(options, self.device)
            check_values(options, data)
            model = build_model(options, data.channels).to(self.device)
            self.data = in_unit_of(model, data, options.nodata, fill=False)
            self.saver = Saver(options, group, model, self.batch, len(data))
            if group.main:
                check_writable(options.output_dir, "--output_dir")
                path = self.saver.find_resumable()
        self.resumed = group.broadcast(path)
        with group.together():
            starts = options.init is not None and self.resumed is None
            self.init = init_model(model, options) if starts else None
        if options.fsdp:
            shard_model(model, group, self.device)
        backend = "torch" if options.fsdp or options.graph else "auto"
        self.state = RunState(
            model,
            adamw(model, self.peak, weight_decay=options.weight_decay, backend=backend, capturable=options.graph),
            torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16),
            torch.Generator(self.device).manual_seed(options.seed),
            Position(options.start_epoch, 0),
            init=None if self.init is None else self.init.record(),
        )
        self.forward = self._forward()
        self.graphs = dict[bool, GraphedStep]()  # by whether batches have weights of patches
        self.len_keep = len_keep(model.patch_embed.num_patches, options.mask_ratio)
        self.one = torch.ones((), device=self.device)
        self.needs_pred = bool(model.overridden_methods())
        self.received: Sequence[int] = ()  # signals, as they arrive
        self.signal = 0  # the signal that ended the run
        with group.together():
            if self.resumed is not None:
                self.saver.resume(self.state, self.resumed)

    def _forward(self) -> Callable[..., Any]:
        """Return the function that a step calls as the model."""
        options, model = self.options, self.state.model
        if options.reference:
            forward = reference_on(model)
            return torch.compile(forward) if options.compile else forward
        module: Any = torch.compile(model) if options.compile else model  # model.compile() would compile pictures again
        return replicate(module) if self.group.world_size > 1 and not options.fsdp else module

    def train(self, received: Sequence[int] = ()) -> dict[str, Any]:
        """Train until the end, or a signal in `received` of any process; return the summary."""
        options, state, main = self.options, self.state, self.group.main
        self.received, journal = received, None
        with self.group.together():
            if main:
                journal = Journal(options, state.at.epoch)
        self.report = Report(options.epochs * self.steps_per_epoch, self._steps_done(), self.batch, self.device, quiet=not main)
        self.losses = Losses(state, self.saver, self.report, self.steps_per_epoch)
        self._introduce(journal)
        samples = self._samples() if main and find_spec("matplotlib") is not None else None
        if options.fsdp:
            samples = self.group.broadcast(samples)
        if isinstance(state.model, PcaTarget) and self.resumed is None:
            with self.group.together():
                state.model.find_components(self._evenly_spaced(state.model.images_for_components))
        feed, saved = self._feed(), state.at
        try:
            while state.at.epoch < options.epochs and self._step(feed):
                ended = state.at.step == self.steps_per_epoch
                if ended:
                    self._end_epoch(journal, samples)
                if ended or (options.save_steps and state.at.step % options.save_steps == 0):
                    self._save()
                    saved = state.at
            if state.at != saved:
                self._save()
        finally:
            feed.close()  # ends the workers
            self.report.close()
            if journal is not None:
                journal.close()
        summary = self._summary()
        if main:
            conclude(summary)
        return summary

    def _summary(self) -> dict[str, Any]:
        state = self.state
        summary: dict[str, Any] = {"epochs": state.at.epoch, "steps": self.report.done, "loss": state.loss}
        summary |= self.report.figures()
        summary |= {"unreadable": len(state.unreadable), "rewinds": state.rewinds, "checkpoint": str(self.saver.newest)}
        return summary | {"signal": self.signal, "finished": state.at.epoch >= self.options.epochs}

    def _introduce(self, journal: Journal | None) -> None:
        options, say = self.options, self.report.say
        if isinstance(self.data, ImageDataset):  # other objects with its methods are allowed
            (self.report.warn if self.data.left_out else say)(self.data.described())
        images = f"{len(self.data)} images of {self.data.channels} channels"
        pace = f"{self.steps_per_epoch} steps of {self.batch} an epoch, learning rate {self.peak:.3g}"
        processes = f" in each of {self.group.world_size} processes" if self.group.world_size > 1 else ""
        say(f"{'the plain ' if options.reference else ''}{options.model} on {self.device}{processes}: {images}, {pace}")
        if self.init is not None:
            say(f"starts from {replace(self.init, warnings=())}")
            for warning in self.init.warnings:
                self.report.warn(f"--init {options.init}: {warning}")
        if self.resumed is not None:
            say(f"resumes from {self.resumed}, step {self.state.at.step} of epoch {self.state.at.epoch}")
        if options.log_dir is not None and (journal is None or journal.board is None):
            say('no TensorBoard events: pip install "maefast[tensorboard]"')
        if options.pictures and find_spec("matplotlib") is None:
            say('no pictures: pip install "maefast[train]"')

    def _steps_done(self) -> int:
        return self.state.at.epoch * self.steps_per_epoch + self.state.at.step

    def _lr(self) -> float:
        """Return the learning rate of the next step. A warm-up may be longer than the run."""
        options = self.options
        warmup = options.warmup_epochs * self.steps_per_epoch
        steps = max(options.epochs * self.steps_per_epoch, warmup)
        return warmup_cosine(self._steps_done(), steps, warmup, self.peak, options.min_lr)

    def _feed(self) -> Generator[Batch]:
        options, at = self.options, self.state.at
        flip = options.augment != "none" if options.flip is None else options.flip
        images = Augmented(self.data, self.state.model.patch_embed.img_size, options.augment, flip, options.seed)
        epochs, accumulated = range(at.epoch, options.epochs), options.accum_iter
        per_epoch, skip = self.steps_per_epoch * accumulated, at.step * accumulated
        share = (self.group.rank, self.group.world_size)
        keys = Keys(len(self.data), options.batch_size, per_epoch, options.seed, epochs, skip, share)
        return load_batches(images, keys, options.num_workers, options.pin_mem and self.device.type == "cuda")

    def _step(self, feed: Iterator[Batch]) -> bool:
        """Run one step on `accum_iter` batches of each process; False if a signal stopped it."""
        options, state, rate = self.options, self.state, self._lr()
        images, weights = self._next_images(feed)
        if self.signal:
            return False
        state.set_lr(rate)
        state.model.train()
        noise = self._noise()
        if options.graph and (weights is None or self._weights(weights, noise[0])[1]):
            loss = self._replay(images, noise[0], weights)
            self.losses.add(torch.stack([loss, self.one.to(loss)]), rate)
        else:
            if options.graph:
                state.optimizer.zero_grad()  # a graph leaves its gradient
            with undone_on_error(state.optimizer):
                self._accumulate(feed, images, weights, noise, rate)
        state.at = Position(state.at.epoch, state.at.step + 1)
        return True

    def _replay(self, images: Tensor, noise: Tensor, weights: Tensor | None) -> Tensor:
        """Take the step as a CUDA graph and return its loss."""
        options, weighted = self.options, weights is not None
        if weighted not in self.graphs:
            given: dict[str, Any] = {"noise": noise, "weights": None if weights is None else weights.to(self.device)}
            given |= {"mask_ratio": options.mask_ratio, "autocast": self.autocast, "clip_grad": options.clip_grad}
            model: Any = self.forward
            self.graphs[weighted] = GraphedStep(model, self.state.optimizer, images.to(self.device), **given)
        return self.graphs[weighted](images, noise, weights)

    def _accumulate(self, feed: Iterator[Batch], images: Tensor, weights: Tensor | None, noises: Tensor, rate: float) -> None:
        """Sum gradients over the batches of a step, `images` the first of them, and take it."""
        options, state, losses = self.options, self.state, list[Tensor]()
        for i, noise in enumerate(noises):
            if i:
                images, weights = self._next_images(feed)
            images, last = images.to(self.device, non_blocking=True), i == options.accum_iter - 1
            given, has_loss = self._weights(weights, noise)
            with nullcontext() if last else no_sync(self.forward):
                with nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast):
                    loss = self.forward(images, options.mask_ratio, noise=noise, return_pred=self.needs_pred, **given).loss
                loss = loss if weights is None else loss * has_loss
                state.scaler.scale(loss / options.accum_iter).backward()
            losses.append(torch.stack([loss.detach(), has_loss.to(loss)]))
        if self.losses.add(self.group.all_reduce_mean(torch.stack(losses).mean(dim=0)), rate):
            if options.clip_grad is not None:
                state.scaler.unscale_(state.optimizer)
                torch.nn.utils.clip_grad_norm_(state.model.parameters(), options.clip_grad)
            state.scaler.step(state.optimizer)
            state.scaler.update()
        state.optimizer.zero_grad()

    def _weights(self, weights: Tensor | None, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the argument `weights` of the forward, and whether a removed patch has a value. If
        not, weights are 1 and the loss is multiplied by 0, so that no process has to wait."""
        if weights is None:
            return {}, self.one
        weights = weights.to(self.device)
        has_loss = (random_masking(noise, self.len_keep)[2] * weights).any()
        return {"weights": torch.where(has_loss, weights, 1.0)}, has_loss

    def _next_images(self, feed: Iterator[Batch]) -> tuple[Tensor, Tensor | None]:
        """Return images of this process, and weights of their patches if values are missing. The
        report counts the longest wait of all processes."""
        started, error = time.perf_counter(), None
        try:
            with dead_workers_reported():
                images, unreadable = next(feed)
            images, weights = fill_missing(images, self.state.model.patch_embed.patch_size)
        except UserError as caught:
            error = caught
        waited = time.perf_counter() - started
        number, failed, waited = self.group.all_reduce_max(max(self.received, default=0), error is not None, waited)
        if failed:
            self.group.raise_any(error)
        self.signal = max(self.signal, int(number))
        self.report.waited += waited
        self._skip(unreadable)
        return images, weights

    def _noise(self) -> Tensor:
        """Return this process's part (accum_iter, batch_size, L) of the noise of all processes."""
        options, grid = self.options, self.state.model.patch_embed.grid_size
        noise = draw_noise(options.sampler, self.batch, grid, self.len_keep, self.state.masks)
        return noise.view(options.accum_iter, self.group.world_size, options.batch_size, -1)[:, self.group.rank]

    def _skip(self, unreadable: Iterable[Unreadable]) -> None:
        """Count and print each unreadable image once, even if crops fail for several reasons."""
        for name, why in sorted(unreadable):
            if name not in self.state.unreadable:
                self.report.say(f"skipped {name}: {why}" if why else f"skipped {name}")
                self.state.unreadable[name] = why

    def _gather(self) -> None:
        """Read all losses, and share the unreadable images among the processes."""
        self.losses.read()
        for unreadable in self.group.all_gather(sorted(self.state.unreadable.items())):
            self._skip(unreadable)

    def _save(self) -> None:
        self._gather()
        self.saver.save(self.state, self.report)

    def _end_epoch(self, journal: Journal | None, samples: Tensor | None) -> None:
        """Write the record of the epoch, then start the next one. A checkpoint is written later: a
        resumed run can remove a record without checkpoint, but cannot add a missing one."""
        self._gather()
        state, epoch = self.state, self.state.at.epoch
        state.loss = state.loss_sum / state.counted if state.counted else state.loss
        record: dict[str, Any] = {"train_lr": state.lr, "train_loss": state.loss, "epoch": epoch} | self.report.figures()
        record |= {"unreadable": len(state.unreadable), "rewinds": state.rewinds}
        if state.init is not None and epoch == self.options.start_epoch:
            record["init"] = state.init
        self.report.line(f"epoch {epoch} of {self.options.epochs}", state.loss, state.lr)
        # All processes take part if the model is sharded.
        panel = None if samples is None else draw(state.model, samples, self.options, epoch)
        with self.group.together():
            if journal is not None:
                journal.add(record, panel)
        state.end_epoch()

    def _evenly_spaced(self, count: int) -> Iterator[Tensor]:
        """Yield images of the data set, the same in every epoch and process."""
        for image, unreadable in evenly_spaced(self.data, self.state.model.patch_embed.img_size, count):
            self._skip(unreadable)
            if image is not None:
                yield image

    def _samples(self) -> Tensor | None:
        images = list(self._evenly_spaced(self.options.pictures))
        return torch.stack(images).to(self.device) if images else None
