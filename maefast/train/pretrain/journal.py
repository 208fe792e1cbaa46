"""The output of a run after each epoch: log.txt, TensorBoard events, pictures."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoints
from ..errors import UserError, user_errors
from ..files import replace_file
from ..pictures import Panel, as_one_picture, make_panel, save_reconstructions
from .options import Options


class Journal:
    """The files of a run in its output_dir, except its checkpoints. Records from `next_epoch` on
    are removed, to be written again. Raises UserError if the folder cannot be written."""

    def __init__(self, options: Options, next_epoch: int):
        self.folder = options.output_dir
        with user_errors(OSError, prefix="--output_dir must be a folder that can be written; "):
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_left_overs(self.folder)
            _drop_records(self.folder / "log.txt", next_epoch)
            self.board = _open_tensorboard(options.log_dir or self.folder, next_epoch)

    def add(self, record: Mapping[str, Any], panel: Panel | None) -> None:
        """Write the record of an epoch and its pictures. Raises UserError if it cannot."""
        epoch = record["epoch"]
        try:
            with (self.folder / "log.txt").open("a") as file:
                file.write(json.dumps(record) + "\n")
            if panel is not None:
                save_reconstructions([panel], self.folder / "reconstructions" / f"epoch-{epoch:04}.png")
        except OSError as error:
            reason = f"{error.strerror or error}; {checkpoints.last_good(self.folder)}"
            raise UserError(f"{self.folder} cannot be written: {reason}") from error
        if self.board is not None:
            for name, value in record.items():
                if name == "init":
                    self.board.add_text(name, json.dumps(value, indent=2), epoch)
                else:
                    self.board.add_scalar(name, value, epoch)
            if panel is not None:
                self.board.add_image("reconstructions", as_one_picture(panel), epoch)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _drop_records(log: Path, next_epoch: int) -> None:
    kept = []
    for line in log.read_text().splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # the process was killed while it wrote this line
            continue
        if record["epoch"] < next_epoch:
            kept.append(line + "\n")
    with replace_file(log) as temporary:
        temporary.write_text("".join(kept))


def _open_tensorboard(folder: Path, next_epoch: int) -> Any:
    """Return a SummaryWriter, or None if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=next_epoch)


def draw(model: nn.Module, images: Tensor, options: Options, epoch: int) -> Panel:
    """Reconstruct images (n, C, H, W) uint8 with `model`, with the same masks after each epoch."""
    title = f"epoch {epoch}, {options.mask_ratio:.0%} of the patches removed"
    return make_panel(title, model, images, options.mask_ratio, options.seed, options.sampler)
