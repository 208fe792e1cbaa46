"""The checkpoints of a run: resuming, saving and rewinding."""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...checkpoint.architecture import of_model
from ...model import MAE
from .. import checkpoints
from ..checkpoints import Position
from ..errors import UserError, user_errors
from ..group import Group
from .options import Options
from .report import Report
from .state import RunState


class Saver:
    """Checkpoints of the run of `options` in its output_dir.

    batch     images per step
    images    images of the data set
    newest    the last checkpoint that was written or resumed from
    """

    def __init__(self, options: Options, group: Group, model: MAE, batch: int, images: int):
        self.options, self.group, self.folder = options, group, options.output_dir
        self.newest: Path | None = None
        self.architecture = asdict(of_model(model))
        facts = {f"the model's {name}": value for name, value in self.architecture.items()}
        variant = {"the target": options.target, "--mask_tokens_in_encoder": options.mask_tokens_in_encoder}
        # A resumed run must have this identity, and within an epoch this pace, for equal batches.
        self.identity: dict[str, Any] = facts | variant | {"the number of images": images, "--nodata": options.nodata}
        self.pace = {"batch_size x accum_iter x processes": batch, "seed": options.seed}

    def find_resumable(self) -> Path | None:
        """Return the checkpoint of --resume, if any. Raises UserError if a new run finds one."""
        there = checkpoints.find(self.folder)
        if there and not self.options.resume:
            ways = "--resume auto resumes it, another folder starts a new run"
            raise UserError(f"--output_dir must hold no earlier run; {self.folder} holds {there[-1].name}: {ways}")
        if self.options.resume in ("", "auto"):
            return there[-1] if there else None
        return Path(self.options.resume)

    def resume(self, state: RunState, path: Path) -> None:
        """Load the checkpoint `path` into `state`. Raises UserError if it is of another run."""
        entries = checkpoints.read(path)
        run = entries["run"]
        there = checkpoints.find(self.folder)
        if there and there[-1].resolve() != path.resolve():
            ways = "--resume auto resumes it, another folder keeps both"
            raise UserError(f"--output_dir must hold no later run than {path}; {self.folder} holds {there[-1].name}: {ways}")
        checkpoints.must_agree(path, run["identity"], self.identity)
        if self.options.init is not None:  # it is not read: the run has changed those weights
            init = run.get("init") or {"file": None}
            checkpoints.must_agree(path, {"--init": init["file"]}, {"--init": self.options.init.name})
        if run["step"]:
            checkpoints.must_agree(path, run["pace"], self.pace)
        if run["masks"].numel() != state.masks.get_state().numel():
            device = state.masks.device.type
            raise UserError(f"--device must be the type that {path} was written on, for the same masks; it is {device}")
        with user_errors(ValueError, prefix=f"--resume must be a checkpoint of the same optimizer; {path} has another: "):
            state.load(entries)
        self.newest = path

    def save(self, state: RunState, report: Report) -> None:
        """Write a checkpoint in the first process, after a rewind if the state is not finite."""
        [broken] = self.group.all_reduce_max(not state.is_finite())
        if broken:
            self.rewind(state, report, "weights or the optimizer's state are not finite", state.at, state.lr)
        entries, path = state.entries(), self.folder / state.at.file_name
        with self.group.together():
            if self.group.main:
                checkpoints.save(entries | self._facts(entries["run"]), path, self.options.keep)
        self.newest = path

    def _facts(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a checkpoint that describe the run, and its state."""
        args = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.options).items()}
        run = {**run, "identity": self.identity, "pace": self.pace}
        return {"args": argparse.Namespace(**args), "config": self.architecture, "run": run}

    def rewind(self, state: RunState, report: Report, what: str, at: Position, rate: float) -> None:
        """Load the weights of the newest checkpoint after the step `at` failed. Raises UserError if
        --rewind does not allow it."""
        where = f"at step {at.step} of epoch {at.epoch}"
        if self.newest is None or state.rewinds >= self.options.rewind:
            hint = "a smaller --blr, --clip_grad 1 or --amp bf16 may help"
            last = checkpoints.last_good(self.folder)
            raise self.group.error(f"the {what} {where}, with a learning rate of {rate:.3g}; {last}; {hint}")
        with self.group.together():
            state.rewind(checkpoints.read(self.newest))
        lost = f"the batches since then are lost (rewind {state.rewinds} of {self.options.rewind})"
        report.say(f"the {what} {where}: the weights of {self.newest} are loaded, {lost}")
