"""`maefast ablate`, the paper's ablations. Each row is pre-training, a probe and fine-tuning."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data.labelled import Chosen, Labelled
from ..data.open import tell
from ..data.sources import ImageDataset
from ..device import find_device
from ..errors import UserError, user_errors
from ..evaluate import commands, finetune
from ..evaluate.source import Source
from ..evaluate.supervised import Recipe
from ..files import check_writable, replace_file
from ..pretrain.build import build_model
from ..pretrain.options import Options
from ..pretrain.trainer import pretrain
from .axes import Row, rows_of

SMALL: dict[str, Any] = {"model": "mae_vit_tiny_patch16", "input_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4}
SMALL |= {"num_heads": 4, "decoder_embed_dim": 32, "decoder_depth": 4, "decoder_num_heads": 4}
BUDGET: dict[str, Any] = {"epochs": 10, "warmup_epochs": 1, "batch_size": 128, "keep": 1, "pictures": 0}
FACTORIES = {"decoder_depth": 8, "decoder_embed_dim": 512}  # of every factory
NO_MATTER = ("output_dir", "log_dir", "num_workers", "pin_mem", "device", "save_steps", "keep", "pictures", "resume", "rewind")
PROBE_BATCH, TUNING_BATCH = 512, 64


@dataclass(frozen=True)
class Budget:
    """The probe and the fine-tuning of each row."""

    images: int | None = None  # of the training split, to pre-train on, drawn by the seed; None: all
    label_fraction: float = 1.0  # of the training split, to learn from with labels
    eval_split: str = "val"
    val_path: Path | None = None
    probe_epochs: int = 90
    probe_blr: float | None = None  # None: the best on held-out images
    finetune_epochs: int = 50
    finetune_blr: float = 1e-3


def base_options(values: Mapping[str, Any]) -> Options:
    """Return the options that rows change, from flags and configuration."""
    return Options(**BUDGET | (FACTORIES if "model" in values else SMALL) | dict(values))


def ablate(base: Options, data: ImageDataset, axes: Sequence[str], budget: Budget) -> list[dict[str, Any]]:
    """Run the rows of `axes` that base.output_dir does not hold yet. Print the table, and write it
    there as table.md and table.json.

    data       the training split of base.data_path
    returns    the rows in the table's order: axis, value, finetune and linprobe (top-1), the last
               loss of pre-training, the paper's value and figures; empty if a signal stopped it
    Finished rows are written to rows.jsonl. An interrupted row resumes from its last checkpoint.
    Raises UserError, before anything is written, for images and options that do not fit an axis,
    each other or the rows in the folder.
    """
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"ablate must run as one process; WORLD_SIZE is {processes}")
    rows, folder = rows_of(axes, base), base.output_dir
    for row in rows:
        with user_errors(UserError, prefix=f"{row.axis} {row.value}: "):
            _check(row, base, data.channels)
    if budget.images is not None and budget.images > len(data):
        raise UserError(f"--images must be at most {len(data)}, the images in {base.data_path}; it is {budget.images}")
    chosen = {name: getattr(budget, name) for name in ("eval_split", "val_path", "label_fraction")}
    labelled = Labelled(base.data_path, exclude=folder, **chosen)
    _, taken, evaluated = labelled.opened(data.channels, base.seed)
    check_writable(folder, "--output_dir")
    done = _done(folder, _plan(base, budget))
    tell(data, evaluated)
    if budget.images is not None:
        ids = torch.randperm(len(data), generator=torch.Generator().manual_seed(base.seed))[: budget.images]
        data = Chosen(data, ids)  # type: ignore[assignment]
    for row in rows:
        if row.name not in done:
            with user_errors(UserError, prefix=f"{row.axis} {row.value}: "):
                record = _run(row, base, data, labelled, len(taken), budget)
            if record is None:
                print("stopped by a signal; the same command resumes it", flush=True)
                return []
            done[row.name] = record
            _write(folder / "rows.jsonl", "".join(json.dumps(each) + "\n" for each in done.values()))
            print(f"{row.name}: fine-tuned {record['finetune']:.1%}, linear probe {record['linprobe']:.1%}", flush=True)
    return _conclude(rows, done, folder)


def _check(row: Row, base: Options, channels: int) -> None:
    """Raise UserError unless the row's model can be built and its patches sampled."""
    with torch.device("meta"):
        build_model(row.options(base), channels)


def _plan(base: Options, budget: Budget) -> dict[str, Any]:
    """Return the settings that the rows of one table share, as JSON reads them."""
    options = {name: value for name, value in asdict(base).items() if name not in NO_MATTER}
    return json.loads(json.dumps(options | {f"budget's {k}": v for k, v in asdict(budget).items()}, default=str))


def _done(folder: Path, plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the finished rows by name. Raises UserError if they belong to another plan."""
    settings, rows = folder / "plan.json", folder / "rows.jsonl"
    if not settings.exists():
        _write(settings, json.dumps(plan, indent=1) + "\n")
    there = json.loads(settings.read_text())
    if differing := [name for name in plan if there.get(name) != plan[name]]:
        name = differing[0]
        what = f"in {folder} {name} is {there.get(name)}, here it is {plan[name]}; another folder starts a new table"
        raise UserError(f"--output_dir must hold only rows of the same options; {what}")
    lines = rows.read_text().splitlines() if rows.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def _run(row: Row, base: Options, data: ImageDataset, labelled: Labelled, labels: int, budget: Budget) -> dict[str, Any] | None:
    """Return the record of a row, or None if a signal ended its pre-training. Its output goes to
    output.txt. Warm-up is a tenth of the epochs, nearly as in the paper's recipes."""
    folder = base.output_dir / row.name
    options = replace(row.options(base), output_dir=folder, resume="auto")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as file, redirect_stdout(file), redirect_stderr(file):
        summary = pretrain(options, data)
        if not summary["finished"]:
            return None
        device = str(find_device(base.device))
        source = Source(Path(summary["checkpoint"]), nodata=base.nodata, device=device, seed=base.seed)
        epochs, sweep = budget.probe_epochs, budget.probe_blr is None
        probe = Recipe(epochs, epochs // 10, min(PROBE_BATCH, labels), budget.probe_blr or 0.0, 0.0, seed=base.seed)
        commands.linprobe(source, labelled, probe, kind="cls", sweep=sweep, output_dir=folder / "linprobe")
        epochs, batch = budget.finetune_epochs, min(TUNING_BATCH, labels)
        recipe = Recipe(epochs, epochs // 10, batch, budget.finetune_blr, 0.05, label_smoothing=0.1, seed=base.seed)
        finetune.finetune(source, labelled, recipe, output=finetune.Output(folder / "finetune"))
    last = {name: (folder / name / "log.txt").read_text().splitlines()[-1] for name in ("finetune", "linprobe")}
    return {"name": row.name, "loss": summary["loss"]} | {name: json.loads(line)["top1"] for name, line in last.items()}


def _conclude(rows: Sequence[Row], done: Mapping[str, Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    table = list[dict[str, Any]]()
    for row in rows:
        finetune, linprobe = row.paper
        figures = {name: done[row.name][name] for name in ("finetune", "linprobe", "loss")}
        paper = {"paper_value": row.paper_value, "paper_finetune": finetune, "paper_linprobe": linprobe}
        table.append({"axis": row.axis, "value": row.value} | figures | paper)
    text = markdown(table)
    _write(folder / "table.md", text)
    _write(folder / "table.json", json.dumps(table, indent=1) + "\n")
    print(text, end="")
    return table


def _write(path: Path, text: str) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(text)


def markdown(table: Collection[Mapping[str, Any]]) -> str:
    """Return the rows beside the paper's (ViT-L/16 on ImageNet-1K): top-1 in per cent."""
    lines = ["| axis | | fine-tuned | linear probe | paper | fine-tuned | linear probe |", "|---|---|---:|---:|---|---:|---:|"]
    for row in table:
        ours = (f"{100 * row[name]:.1f}" for name in ("finetune", "linprobe"))
        paper = ("" if row[name] is None else f"{row[name]:.1f}" for name in ("paper_finetune", "paper_linprobe"))
        lines.append(f"| {' | '.join((row['axis'], row['value'], *ours, row['paper_value'], *paper))} |")
    return "\n".join(lines) + "\n"
