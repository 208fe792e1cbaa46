"""What the commands extract, knn, linprobe and reconstruct do: a checkpoint and images in, numbers out."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import write_pickled
from ..encoder import VisionTransformer
from ..model import MAE
from . import UserError, require, supervised
from .boxes import TRAINING_AREA, Size, View, draw_of, drawn, still
from .data import split as stratified
from .features import check_fits, check_output, collect, features_of, load_encoder, write_features
from .files import check_writable, replace_file
from .knn import knn_votes
from .linprobe import LinearProbe, ProbedEncoder, best_blr, optimizer_of
from .setup import find_device
from .supervised import Recipe
from .variants import variant_with
from .views import read_batches


@dataclass(frozen=True)
class Source:
    """A checkpoint, and what it may not tell; None: what it tells."""

    checkpoint: Path
    input_size: int | None = None
    num_heads: int | None = None
    decoder_num_heads: int | None = None  # of reconstruct alone
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    random_init: bool = False
    device: str = "cpu"
    seed: int = 0

    def overrides(self) -> dict[str, Any]:
        given = {"img_size": self.input_size, "mean": self.mean, "std": self.std}
        given |= {"num_heads": self.num_heads, "decoder_num_heads": self.decoder_num_heads}
        return {name: value for name, value in given.items() if value is not None}

    def encoder(self, **options: Any) -> VisionTransformer:
        """On its device; all that is random later follows from the seed too."""
        torch.manual_seed(self.seed)
        encoder = load_encoder(self.checkpoint, random_init=self.random_init, **self.overrides(), **options)
        return encoder.to(find_device(self.device))


@dataclass(frozen=True)
class Labelled:
    """A labelled data set in two parts, and how its images are looked at."""

    data: Path
    train_split: str = "train"
    eval_split: str = "val"
    label_fraction: float = 1.0  # of each class of the first part, by the seed
    crop_pct: float | None = None  # of the largest centred box, per side; None: boxes.usual_scale
    augment: str = "none"

    def opened(self, channels: int, seed: int) -> tuple[Any, Tensor, Any]:
        """The data set to learn from, the indices of the images in it to take, and the one to score. Raises UserError."""
        train, evaluated = open_data(self.data, self.train_split, channels), open_data(self.data, self.eval_split, channels)
        for images, name in ((train, self.train_split), (evaluated, self.eval_split)):
            if len(images.classes) < 2:
                raise UserError(f"DATA must have two classes or more; the {name} part of {self.data} has {len(images.classes)}")
            if missing := int((images.labels < 0).sum()):
                count = f"{missing} of {len(images)} images"
                raise UserError(f"DATA must have a label for every image; in the {name} part of {self.data} {count} have none")
        if train.classes != evaluated.classes:
            parts = f"the {self.train_split} and {self.eval_split} parts of {self.data}"
            raise UserError(f"DATA must have the same classes in both parts; {parts} have others")
        taken = torch.arange(len(train))
        if self.label_fraction < 1:
            _, taken = stratified(train.labels, self.label_fraction, seed)
            if len(train.labels[taken].unique()) < len(train.labels.unique()):
                fraction = self.label_fraction
                raise UserError(f"--label_fraction must leave an image of each class in {self.data}; {fraction:g} does not")
        return train, taken, evaluated


class Chosen:
    """Some images of a data set, by their indices."""

    def __init__(self, images: Any, ids: Tensor):
        self.images, self.ids = images, ids
        self.labels, self.channels = images.labels[ids], images.channels

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int, *where: Any) -> Tensor:
        image: Tensor = self.images.read(int(self.ids[index]), *where)
        return image

    def read_many(self, indices: Sequence[int], *where: Any) -> Tensor:
        images: Tensor = self.images.read_many(self.ids[list(indices)].tolist(), *where)
        return images


def open_data(path: Path, split: str | None, channels: int) -> Any:
    """An ImageDataset of that many channels."""
    from .dataset import open_images

    return open_images(path, split=split, channels=channels)


def extract(
    source: Source, data: Path, split: str | None, out: Path, *, kind: str, batch_size: int, crop_pct: float | None
) -> None:
    """Features of all images of `data` to `out`, a .npy or .parquet file."""
    check_output(out)
    encoder = source.encoder()
    images = open_data(data, split, encoder.patch_embed.proj.in_channels)
    check_fits(encoder, images)
    shape = {"all": (1 + encoder.patch_embed.num_patches, encoder.embed_dim)}.get(kind, (encoder.embed_dim,))
    batches = features_of(encoder, images, kind, batch_size=batch_size, part=crop_pct)
    write_features(batches, len(images), shape, out)
    print(f"{out}: features of {len(images)} images, {' x '.join(map(str, shape))} each")


def knn(source: Source, data: Labelled, *, k: int, temperature: float, kind: str, batch_size: int) -> None:
    """Print the accuracy of weighted k-NN."""
    encoder, train, evaluated = prepared(source, data)
    if k > len(train):
        raise UserError(f"--k must be at most {len(train)}, the number of images with labels; it is {k}")
    (bank, labels), (queries, truth) = (
        collect(features_of(encoder, images, kind, batch_size=batch_size, part=data.crop_pct)) for images in (train, evaluated)
    )
    votes = knn_votes(bank, labels, queries, len(evaluated.classes), k=k, temperature=temperature)
    print_score(int((votes.argmax(dim=1) == truth).sum()), len(truth))


def linprobe(source: Source, data: Labelled, recipe: Recipe, *, kind: str, output_dir: Path | None, sweep: bool = False) -> None:
    """Train a linear probe and print its accuracy; features are computed once unless images are augmented.

    sweep    take `best_blr` instead of the recipe's
    """
    encoder, train, evaluated = prepared(source, data)
    check_run(recipe, train, output_dir)
    probe = LinearProbe(encoder.embed_dim, len(train.images.classes)).to(source.device)
    scored = collect(features_of(encoder, evaluated, kind, part=data.crop_pct))
    model: torch.nn.Module = probe
    if sweep or data.augment == "none":
        known = collect(features_of(encoder, train, kind, part=data.crop_pct))
    if sweep:
        recipe = replace(recipe, blr=best_blr(*known, len(train.images.classes), recipe, source.device))
    if data.augment == "none":
        batches = supervised.in_memory(*known)
    else:
        model, batches = ProbedEncoder(encoder, probe, kind), augmented(train, encoder.patch_embed.img_size, recipe.seed)
    log = Log(output_dir)
    for epoch in supervised.fit(model, optimizer_of(probe, recipe), batches, len(train), recipe):
        log.add(epoch, supervised.count_correct(probe, supervised.in_memory(*scored), len(evaluated)), len(evaluated))
    log.close({"probe": probe.state_dict()})


def reconstruct(source: Source, data: Path, split: str | None, out: Path, *, mask_ratio: float, count: int) -> None:
    """A picture of the first `count` images of `data`: original, masked and reconstructed."""
    from .pictures import make_panel, save_reconstructions

    require("reconstruct needs", {"matplotlib": "matplotlib"}, "eval")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UserError(f"OUT must be a .png file in a folder that exists; it is {out}")
    model = load_mae(source)
    images = open_data(data, split, model.patch_embed.proj.in_channels)
    check_fits(model, images)
    if images.channels not in (1, 3):
        raise UserError(f"pictures are of 1 or 3 channels; the images have {images.channels}")
    ids = torch.arange(min(count, len(images)))
    size = model.patch_embed.img_size
    ((pixels, _),) = read_batches(images, [ids], size, still(size, 1.0))
    try:
        panel = make_panel(f"{source.checkpoint.name}, mask ratio {mask_ratio:g}", model.eval(), pixels, mask_ratio, source.seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error
    try:
        save_reconstructions([panel], out)
    except OSError as error:
        raise UserError(f"OUT cannot be written; {out}: {error.strerror or error}") from error
    print(f"{out}: {len(ids)} images")


def load_mae(source: Source) -> MAE:
    """The whole model of a checkpoint. Raises UserError for one without decoder."""
    from .. import checkpoint

    torch.manual_seed(source.seed)
    try:
        model, report = checkpoint.from_pretrained(MAE, source.checkpoint, **source.overrides())
        if (cls := variant_with(report.ignored)) is not MAE:
            model, report = checkpoint.from_pretrained(cls, source.checkpoint, **source.overrides())
    except (checkpoint.CheckpointError, checkpoint.MissingPackageError, OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if not report.has_decoder:
        raise UserError(f"CHECKPOINT must have a decoder to reconstruct with; {source.checkpoint} has none")
    return model


class Log:
    """A line for each epoch on stderr; log.txt, one JSON object for each, and checkpoint.pth in a folder, if there is one.

    records    of the epochs of an earlier process
    """

    def __init__(self, folder: Path | None, records: Sequence[dict[str, Any]] = ()):
        self.folder, self.records = folder, list(records)

    def add(self, epoch: supervised.Epoch, correct: int | None, count: int) -> None:
        """An epoch, and how many of `count` images were right after it; None where they were not looked at."""
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


def prepared(source: Source, data: Labelled, **options: Any) -> tuple[VisionTransformer, Chosen, Any]:
    """The encoder, the images to learn from and those to score, which fit it."""
    encoder = source.encoder(**options)
    train, taken, evaluated = data.opened(encoder.patch_embed.proj.in_channels, source.seed)
    for images in (train, evaluated):
        check_fits(encoder, images)
    return encoder, Chosen(train, taken), evaluated


def check_run(recipe: Recipe, train: Chosen, output_dir: Path | None) -> None:
    recipe.check(len(train))
    if output_dir is not None:
        check_writable(output_dir, "--output_dir")


def reading(images: Any, size: Size, view: Callable[[int], View | Callable[[int], View]]) -> supervised.Batches:
    return lambda epoch, batches: read_batches(images, batches, size, view(epoch))


def augmented(images: Chosen, size: Size, seed: int) -> supervised.Batches:
    """A random box of each image, mirrored half of the time, anew in each epoch."""

    def view(epoch: int, index: int) -> View:
        return drawn(draw_of(seed, epoch, index), size, "rrc", True, TRAINING_AREA)

    return reading(images, size, lambda epoch: partial(view, epoch))
