"""`maefast demo`: pre-train a small MAE on real images, show its result and its cost."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...model import MAE
from ..data.open import find_images
from ..errors import require
from ..files import check_writable, replace_file
from ..pictures import Panel, make_panel, save_losses, save_reconstructions
from .compare import Comparison, compare
from .experiments import DIGITS, FOLDER, PHOTOGRAPHS, Experiment
from .images import ImageSet, batches, centre_crops, digits, enough_per_class, image_folder, photographs
from .loop import train_loop
from .probe import SHOTS, few_label_probe, patch_features, table, verdict

NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "PIL": "pillow", "tqdm": "tqdm", "numpy": "numpy"}
PICTURES = 8  # in a row of reconstruction.png


@dataclass
class Trained:
    """A trained model of the demo, and its cost."""

    recipe: Experiment
    data: ImageSet
    model: MAE
    untrained: dict[str, Tensor]  # the weights it started from
    comparison: Comparison
    records: list[dict[str, Any]]
    seconds: float
    probe: list[dict[str, Any]] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        return self.recipe.steps * self.recipe.batch_size / self.seconds


def demo(
    *,
    data: Path | None = None,
    output: Path = Path("maefast-demo"),
    steps: int | None = None,
    batch_size: int | None = None,
    mask_ratio: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train, compare, probe and draw. Write checkpoint.pt, reconstruction.png, loss.png, log.jsonl.

    data     a folder of images; scikit-learn's digits and photographs if not given
    steps, batch_size, mask_ratio    None: those of the recipe
    returns  the summary, which is also the last line of log.jsonl
    Raises UserError, before any work, for errors that the user can correct.
    """
    started = time.perf_counter()
    require("the demo needs", NEEDS, "demo")
    recipes = [(DIGITS if data is None else FOLDER).changed(steps, batch_size, mask_ratio)]
    if data is None:
        photo_steps = None if steps is None else max(1, steps * PHOTOGRAPHS.steps // DIGITS.steps)
        recipes.append(PHOTOGRAPHS.changed(photo_steps, None, mask_ratio))
    else:
        find_images(data, exclude=output)
    check_writable(output)

    trained = [train(recipe, _load(recipe, data, output, seed), seed) for recipe in recipes]
    main = trained[0]
    held = run_probe(main, seed)

    save_reconstructions([_panel(each, seed) for each in trained], output / "reconstruction.png")
    curves = [(each.recipe.name, [r["step"] for r in each.records], [r["loss"] for r in each.records]) for each in trained]
    save_losses(curves, output / "loss.png")
    _save_checkpoint(main, seed, output / "checkpoint.pt")
    summary = _summary(trained, held, time.perf_counter() - started, output)
    with replace_file(output / "log.jsonl") as temporary:
        lines = [{"model": each.recipe.name, **record} for each in trained for record in each.records]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*lines, summary]))
    _print_summary(trained, summary)
    return summary


def _load(recipe: Experiment, folder: Path | None, output: Path, seed: int) -> ImageSet:
    side = recipe.config["img_size"]
    if folder is not None:
        data = image_folder(folder, side * 9 // 8, seed, exclude=output)
        for path, why in data.skipped:
            print(f"skipped {path}: {why}")
        if data.skipped:
            print(f"{len(data.skipped)} unreadable {'file' if len(data.skipped) == 1 else 'files'} skipped")
        source = str(folder)
    else:
        data, source = (digits(seed) if recipe.name == "digits" else photographs(side)), "scikit-learn"
    kind = "tiles of two photographs" if recipe.name == "photographs" else recipe.name
    print(f"{len(data.images)} {kind} from {source}: {len(data.train)} to train on, {len(data.held_out)} held out", flush=True)
    return data


def _stream(recipe: Experiment, data: ImageSet, seed: int) -> Iterator[Tensor]:
    return batches(data, recipe.config["img_size"], recipe.batch_size, torch.Generator().manual_seed(seed), recipe.flip)


def train(recipe: Experiment, data: ImageSet, seed: int) -> Trained:
    """Time a fresh model against the reference, then pre-train it from the same seed."""
    torch.manual_seed(seed)
    stream = _stream(recipe, data, seed)
    comparison = compare(recipe.config, stream, rounds=recipe.steps, lr=recipe.lr / 10, mask_ratio=recipe.mask_ratio, seed=seed)
    print(f"{recipe.name}: {comparison}", flush=True)

    torch.manual_seed(seed)
    model = MAE(**recipe.config)
    untrained = {name: value.clone() for name, value in model.state_dict().items()}
    start = time.perf_counter()
    stream = _stream(recipe, data, seed)
    records = train_loop(model, stream, title=recipe.name, steps=recipe.steps, lr=recipe.lr, mask_ratio=recipe.mask_ratio)
    model.eval()
    return Trained(recipe, data, model, untrained, comparison, records, time.perf_counter() - start)


def run_probe(trained: Trained, seed: int) -> bool | None:
    """Print and store the few-label table. Return whether pre-training won; None: no classes."""
    data = enough_per_class(trained.data, labelled=min(SHOTS))
    if data is None or data.labels is None:
        few = f"{min(SHOTS) + 1} or more images each, one of them held out"
        print(f"no few-label probe: it needs two or more class folders, with {few}")
        return None
    if len(data.classes) < len(trained.data.classes):
        print(f"the probe leaves out {len(trained.data.classes) - len(data.classes)} classes of too few images")
    images = centre_crops(data.images, trained.recipe.config["img_size"])
    untrained = MAE(**trained.recipe.config).eval()
    untrained.load_state_dict(trained.untrained)
    representations = {
        "pre-trained encoder": patch_features(trained.model, images),
        "untrained encoder": patch_features(untrained, images),
        "raw pixels": images.flatten(1) / 255.0,
    }
    rows = few_label_probe(representations, data.labels, data.train, data.held_out, seed=seed)
    trained.probe = [vars(row).copy() for row in rows]
    held, sentence = verdict(rows, "pre-trained encoder")
    chance = f"{len(data.classes)} classes, {len(data.held_out)} held-out images"
    print(f"\nAccuracy of logistic regression on frozen features ({chance}; mean ± std of {rows[0].draws} draws of labels):\n")
    print(f"{table(rows)}\n\n{sentence}\n", flush=True)
    if all(row.labels_per_class is not None for row in rows):
        print(f"No column for all {len(data.train)} labels: with images this large, that fit would take long.\n", flush=True)
    return held


def _panel(trained: Trained, seed: int) -> Panel:
    recipe, held_out = trained.recipe, trained.data.held_out
    ids = held_out[torch.linspace(0, len(held_out) - 1, min(PICTURES, len(held_out))).round().long()]
    images = centre_crops(trained.data.images[ids], recipe.config["img_size"])
    title = f"{recipe.name}, held out of the training; {recipe.mask_ratio:.0%} of the patches removed"
    return make_panel(title, trained.model, images, recipe.mask_ratio, seed)


def _save_checkpoint(trained: Trained, seed: int, path: Path) -> None:
    """Write a checkpoint of the official layout; `MAE(**checkpoint["config"])` builds the model."""
    recipe = trained.recipe
    args = {name: getattr(recipe, name) for name in ("steps", "batch_size", "mask_ratio", "lr")} | {"seed": seed}
    with replace_file(path) as temporary:
        torch.save({"model": trained.model.state_dict(), "config": recipe.config, "args": args}, temporary)


def _summary(trained: list[Trained], held: bool | None, seconds: float, output: Path) -> dict[str, Any]:
    models = {
        each.recipe.name: {
            "steps": each.recipe.steps,
            "batch_size": each.recipe.batch_size,
            "loss": each.records[-1]["loss"],
            "seconds": each.seconds,
            "images_per_second": each.images_per_second,
            "ratio_to_reference": each.comparison.ratio,
            "ratio_interval": each.comparison.interval,
            "ratio_rounds": len(each.comparison.ratios),
            "loss_difference": each.comparison.loss_difference,
        }
        for each in trained
    }
    skipped = [path for path, _ in trained[0].data.skipped]
    summary = {"summary": models, "probe": trained[0].probe, "probe_held": held}
    return summary | {"skipped": skipped, "seconds": seconds, "output": str(output)}


def _print_summary(trained: list[Trained], summary: dict[str, Any]) -> None:
    for each in trained:
        first, last = each.records[0]["loss"], each.records[-1]["loss"]
        training = f"{each.recipe.steps} steps in {each.seconds:.0f} s, {each.images_per_second:.0f} images/s"
        speed = f"speed against the eager reference {each.comparison.speed}"
        print(f"{each.recipe.name}: {training}, loss {first:.3f} -> {last:.3f}; {speed}")
    names = ("reconstruction.png", "loss.png", "checkpoint.pt", "log.jsonl")
    print(f"{summary['seconds']:.0f} s in all; look at {', '.join(str(Path(summary['output']) / name) for name in names)}")
