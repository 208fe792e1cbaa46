"""The commands extract, knn, linprobe and reconstruct."""

from dataclasses import replace
from pathlib import Path

import torch

from ..data.crops import still
from ..data.labelled import Labelled, augmented, read_batches
from ..data.open import open_images, tell
from ..errors import UserError, require, user_errors
from ..files import writing
from . import supervised
from .features import check_output, collect, features_of, fitted, write_features
from .knn import knn_votes
from .linprobe import LinearProbe, ProbedEncoder, best_blr, optimizer_of
from .log import Log, check_run, print_score
from .source import Source, load_mae, prepared
from .supervised import Recipe


def extract(
    source: Source, data: Path, split: str | None, out: Path, *, kind: str, batch_size: int, crop_pct: float | None
) -> None:
    """Write features of all images of `data` to `out`, a .npy or .parquet file."""
    check_output(out)
    encoder = source.encoder()
    images = fitted(encoder, open_images(data, split, encoder.patch_embed.proj.in_channels, out), source.nodata)
    tell(images)
    shape = {"all": (1 + encoder.patch_embed.num_patches, encoder.embed_dim)}.get(kind, (encoder.embed_dim,))
    batches = features_of(encoder, images, kind, batch_size=batch_size, part=crop_pct)
    write_features(batches, len(images), shape, out)
    print(f"{out}: features of {len(images)} images, {' x '.join(map(str, shape))} each")


def knn(source: Source, data: Labelled, *, k: int, temperature: float, kind: str, batch_size: int) -> None:
    """Print the accuracy of weighted k-NN."""
    encoder, train, evaluated = prepared(source, data)
    if k > len(train):
        raise UserError(f"--k must be at most {len(train)}, the number of training images; it is {k}")
    tell(train.images, evaluated)
    (bank, labels), (queries, truth) = (
        collect(features_of(encoder, images, kind, batch_size=batch_size, part=data.crop_pct)) for images in (train, evaluated)
    )
    votes = knn_votes(bank, labels, queries, len(evaluated.classes), k=k, temperature=temperature)
    print_score(int((votes.argmax(dim=1) == truth).sum()), len(truth))


def linprobe(source: Source, data: Labelled, recipe: Recipe, *, kind: str, output_dir: Path | None, sweep: bool = False) -> None:
    """Train a linear probe, with `best_blr` if `sweep`, and print its accuracy."""
    encoder, train, evaluated = prepared(source, data)
    check_run(recipe, train, output_dir)
    tell(train.images, evaluated)
    probe = LinearProbe(encoder.embed_dim, len(train.images.classes)).to(source.device)
    scored = collect(features_of(encoder, evaluated, kind, part=data.crop_pct))
    model: torch.nn.Module = probe
    if sweep or data.augment == "none":  # features are computed once
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
    """Draw the first `count` images of `data`: original, masked and reconstructed."""
    from ..pictures import make_panel, save_reconstructions

    require("reconstruct needs", {"matplotlib": "matplotlib"}, "eval")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UserError(f"OUT must be a .png file in a folder that exists; it is {out}")
    model = load_mae(source)
    images = fitted(model, open_images(data, split, model.patch_embed.proj.in_channels, out), source.nodata)
    if images.channels not in (1, 3):
        raise UserError(f"DATA must have 1 or 3 channels for pictures; the images have {images.channels}")
    ids = torch.arange(min(count, len(images)))
    size = model.patch_embed.img_size
    ((pixels, _),) = read_batches(images, [ids], size, still(size, 1.0))
    with user_errors(ValueError, prefix="--"):
        panel = make_panel(f"{source.checkpoint.name}, mask ratio {mask_ratio:g}", model.eval(), pixels, mask_ratio, source.seed)
    tell(images)
    with writing("OUT", out):
        save_reconstructions([panel], out)
    print(f"{out}: {len(ids)} images")
