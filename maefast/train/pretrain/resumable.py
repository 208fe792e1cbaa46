"""What a pre-training is between two of its steps: built from its options, written to checkpoints, taken up from one."""

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...checkpoint.architecture import of_model
from ...model import MAE
from .. import checkpoints, sharding
from ..baseline import reference_on
from ..checkpoints import Position
from ..device import find_device
from ..errors import UserError
from ..files import check_writable
from ..group import Group
from ..optim import adamw
from .build import build_model
from .options import Options
from .report import Report

if TYPE_CHECKING:
    from ..data.sources import ImageDataset

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}


class Resumable:
    """The model, its optimizer and the place in the run, the same in all processes of `group`."""

    def __init__(self, options: Options, data: "ImageDataset", group: Group):
        """Raises UserError, in all processes alike and before anything is written, for what does not fit together."""
        self.options, self.data, self.group, self.folder = options, data, group, options.output_dir
        self.batch = options.batch_size * options.accum_iter * group.size  # images of a step
        self.steps_per_epoch = len(data) // self.batch
        self.peak = options.blr * self.batch / 256 if options.lr is None else options.lr
        self.at = Position(options.start_epoch, 0)
        self.loss_sum, self.counted = 0.0, 0  # over the steps of this epoch that no rewind has undone
        self.loss = math.nan  # of the last step, or the mean of the epoch that it ended
        self.unreadable = set[str]()
        self.rewinds = 0
        path = None
        with group.together():
            self._check_options()
            self.device = find_device(options.device, group.local_rank)
            amp = options.amp or ("bf16" if self.device.type == "cuda" else "off")
            if amp == "fp16" and self.device.type != "cuda":
                raise UserError(f"--amp fp16 must run on a GPU; the device is {self.device}")
            self.autocast = DTYPES[amp]
            self.model = build_model(options, data.channels).to(self.device)
            self.len_keep = int(self.model.patch_embed.num_patches * (1 - options.mask_ratio))
            self.needs_pred = bool(self.model.overridden_methods())
            if options.reference and type(self.model) is not MAE:
                raise UserError("--reference must go without --mask_tokens_in_encoder and --target pca; it is the plain MAE")
            if group.main:
                check_writable(self.folder, "--output_dir")
                path = self._checkpoint_to_resume()

        if options.fsdp:
            sharding.shard(self.model, group, self.device)
        self.forward = self._forward()
        backend = "torch" if options.fsdp else "auto"
        self.optimizer = adamw(self.model, self.peak, weight_decay=options.weight_decay, backend=backend)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.masks = torch.Generator(self.device).manual_seed(options.seed)
        self.resumed = self.newest = group.first(path)
        with group.together():
            if self.resumed is not None:
                self._resume(self.resumed)

    def _check_options(self) -> None:
        options, several = self.options, self.group.size > 1
        if not self.steps_per_epoch:
            needed = f"--batch_size x --accum_iter{' x processes' if several else ''} = {self.batch} images"
            raise UserError(f"--data_path must hold at least {needed}; {options.data_path} holds {len(self.data)}")
        if options.start_epoch >= options.epochs:
            raise UserError(f"--start_epoch must be less than --epochs, {options.epochs}; it is {options.start_epoch}")
        if options.fsdp and self.group.local_rank is None:
            raise UserError("--fsdp must run in several processes (torchrun --nproc_per_node N); this one was started alone")
        if options.reference and self.group.local_rank is not None:
            raise UserError(f"--reference must run in a process started alone; there are {self.group.size}")

    def _forward(self) -> Callable[..., Any]:
        """What a step calls in the place of the model."""
        if self.options.reference:
            forward = reference_on(self.model)
            return torch.compile(forward) if self.options.compile else forward
        # Not model.compile(): pictures have another batch size, and would compile once more.
        module: Any = torch.compile(self.model) if self.options.compile else self.model
        return sharding.replicate(module) if self.group.size > 1 and not self.options.fsdp else module

    def _identity(self) -> dict[str, Any]:
        """What a run cannot change when it goes on."""
        facts = {f"the model's {name}": value for name, value in asdict(of_model(self.model)).items()}
        variant = {"the target": self.options.target, "--mask_tokens_in_encoder": self.options.mask_tokens_in_encoder}
        return facts | variant | {"the number of images": len(self.data)}

    def _pace(self) -> dict[str, int]:
        """What it cannot change within an epoch, whose remaining batches would be others."""
        return {"batch_size x accum_iter x processes": self.batch, "seed": self.options.seed}

    def _checkpoint_to_resume(self) -> Path | None:
        there = checkpoints.find(self.folder)
        if not self.options.resume:
            if there:
                ways = "--resume auto goes on with it, another folder starts anew"
                raise UserError(f"--output_dir must hold no earlier run; {self.folder} holds {there[-1].name}: {ways}")
            return None
        if self.options.resume == "auto" and not there:
            return None
        return there[-1] if self.options.resume == "auto" else Path(self.options.resume)

    def _resume(self, path: Path) -> None:
        entries = checkpoints.read(path)
        run = entries["run"]
        there = checkpoints.find(self.folder)
        if there and there[-1].resolve() != path.resolve():
            ways = "--resume auto goes on with it, another folder keeps both"
            raise UserError(f"--output_dir must hold no later run than {path}; {self.folder} holds {there[-1].name}: {ways}")
        checkpoints.must_agree(path, run["identity"], self._identity())
        if run["step"]:
            checkpoints.must_agree(path, run["pace"], self._pace())
        self.at = Position(entries["epoch"] + 1, run["step"])
        try:
            self._load(entries)
        except ValueError as error:
            raise UserError(f"--resume must be a checkpoint of the same optimizer; {path} has another: {error}") from error
        if run["masks"].numel() != self.masks.get_state().numel():
            raise UserError(f"--device must be of the kind that {path} was written on, for its masks; it is {self.device.type}")
        self.masks.set_state(run["masks"])
        self.loss_sum, self.counted, self.loss = run["loss_sum"], run["counted"], run["loss"]
        self.rewinds = run["rewinds"]
        self.unreadable.update(run["unreadable"])

    def _load(self, entries: Mapping[str, Any]) -> None:
        """What a step changes, and a step over again would start from."""
        weights, optimizer = entries["model"], entries["optimizer"]
        if self.options.fsdp:
            weights = sharding.spread(weights, self.model.state_dict())
            optimizer = sharding.spread_optimizer(optimizer, self.optimizer)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        for group, decay in zip(self.optimizer.param_groups, (self.options.weight_decay, 0.0), strict=True):
            group["weight_decay"] = decay
        if entries["scaler"]:
            self.scaler.load_state_dict(entries["scaler"])

    def rewind(self, what: str, at: Position, rate: float, report: Report) -> None:
        """After a step at `at` that went wrong, go on from here with the weights of the newest checkpoint. Raises UserError where
        --rewind does not allow it."""
        if self.newest is None or self.rewinds >= self.options.rewind:
            raise self._diverged(what, at, rate)
        with self.group.together():
            entries = checkpoints.read(self.newest)
            self._load(entries)
        run, same_epoch = entries["run"], entries["epoch"] + 1 == self.at.epoch
        self.loss_sum, self.counted = (run["loss_sum"], run["counted"]) if same_epoch else (0.0, 0)
        self.rewinds += 1
        where = f"at step {at.step} of epoch {at.epoch}"
        count = f"{self.rewinds} of {self.options.rewind}"
        report.say(f"the {what} {where}: the weights of {self.newest}, the batches since then left out (rewind {count})")

    def save(self, report: Report) -> None:
        """Write a checkpoint, by the first process; the others wait."""
        [broken] = self.group.most(not sharding.finite((self.model.state_dict(), self.optimizer.state_dict()["state"])))
        if broken:
            rate = self.optimizer.param_groups[0]["lr"]
            self.rewind("weights or the optimizer's state are not finite", self.at, rate, report)
        weights, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        if self.options.fsdp:
            weights, optimizer = sharding.gathered(weights), sharding.gathered(optimizer)
        self.newest = self.folder / self.at.file_name
        with self.group.together():
            if self.group.main:
                checkpoints.save(self._entries(weights, optimizer), self.newest, self.options.keep)

    def _entries(self, weights: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
        args = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.options).items()}
        return {
            "model": weights,
            "optimizer": optimizer,
            "epoch": self.at.epoch - 1,
            "scaler": self.scaler.state_dict(),
            "args": argparse.Namespace(**args),
            "config": asdict(of_model(self.model)),
            "run": {
                "step": self.at.step,
                "masks": self.masks.get_state(),
                "loss_sum": self.loss_sum,
                "counted": self.counted,
                "rewinds": self.rewinds,
                "loss": self.loss,
                "unreadable": sorted(self.unreadable),
                "identity": self._identity(),
                "pace": self._pace(),
            },
        }

    def _diverged(self, what: str, at: Position, rate: float) -> UserError:
        where = f"at step {at.step} of epoch {at.epoch}, with a learning rate of {rate:.3g}"
        hint = "a smaller --blr, --clip_grad 1 or --amp bf16 may help"
        return self.group.error(f"the {what} {where}; {checkpoints.last_good(self.folder)}; {hint}")
