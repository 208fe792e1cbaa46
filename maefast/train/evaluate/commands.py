"""What the commands extract, knn, linprobe and reconstruct do: a checkpoint and images in, numbers out."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.files import write_pickled
from ...encoder import VisionTransformer
from ...model import MAE
from ..data.crops import still
from ..data.labelled import Chosen, Labelled, augmented, read_batches
from ..data.open import open_images
from ..device import find_device
from ..errors import UserError, require
from ..files import check_writable, replace_file
from ..variants import variant_with
from . import supervised
from .features import check_fits, check_output, collect, features_of, load_encoder, write_features
from .knn import knn_votes
from .linprobe import LinearProbe, ProbedEncoder, best_blr, optimizer_of
from .supervised import Recipe


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


def extract(
    source: Source, data: Path, split: str | None, out: Path, *, kind: str, batch_size: int, crop_pct: float | None
) -> None:
    """Features of all images of `data` to `out`, a .npy or .parquet file."""
    check_output(out)
    encoder = source.encoder()
    images = open_images(data, split, encoder.patch_embed.proj.in_channels)
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
    from ..pictures import make_panel, save_reconstructions

    require("reconstruct needs", {"matplotlib": "matplotlib"}, "eval")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UserError(f"OUT must be a .png file in a folder that exists; it is {out}")
    model = load_mae(source)
    images = open_images(data, split, model.patch_embed.proj.in_channels)
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
    from ... import checkpoint

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
