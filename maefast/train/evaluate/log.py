"""The output of training with labels: lines, log.txt and checkpoint.pth."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...checkpoint.files import write_pickled
from ..data.labelled import Chosen
from ..files import check_writable, replace_file
from .supervised import Epoch, Recipe


class Log:
    """The log of a training: a line per epoch on stderr; log.txt and checkpoint.pth in `folder`.
    `records` are those of an earlier process."""

    def __init__(self, folder: Path | None, records: Sequence[dict[str, Any]] = ()):
        self.folder, self.records = folder, list(records)

    def add(self, epoch: Epoch, correct: int | None, count: int) -> None:
        """Add an epoch, after which `correct` of `count` images are right (None: not scored)."""
        score = {} if correct is None else {"top1": correct / count, "correct": correct, "images": count}
        self.records.append(asdict(epoch) | score)
        shown = "" if correct is None else f", top-1 {correct / count:.4f}"
        print(f"epoch {epoch.epoch}: loss {epoch.loss:.4f}{shown}", file=sys.stderr, flush=True)
        if self.folder is not None:
            with replace_file(self.folder / "log.txt") as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def close(self, entries: dict[str, Any]) -> None:
        last = self.records[-1]
        if self.folder is not None:
            write_pickled(entries, self.folder / "checkpoint.pth")
        print_score(last["correct"], last["images"])


def print_score(correct: int, count: int) -> None:
    print(f"top-1 {correct / count:.4f} ({correct} of {count} images)")


def check_run(recipe: Recipe, train: Chosen, output_dir: Path | None) -> None:
    recipe.check(len(train))
    if output_dir is not None:
        check_writable(output_dir, "--output_dir")
