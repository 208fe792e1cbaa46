"""Photographs, a small MAE, fine-tuning and scores for denoise, inpaint and super_resolution.

The pictures are tiles of scikit-learn's two photographs, 64 x 64 pixels. Of each photograph a band
is held out: what is scored lies within it, what is trained on outside it.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import MAE
from maefast.cli.parser import Parser
from maefast.train.demo import images
from maefast.train.demo.experiments import PHOTOGRAPHS
from maefast.train.demo.loop import train_loop
from maefast.train.optim import adamw
from maefast.train.schedule import warmup_cosine

SIDE, BATCH = 64, 16
MODEL = PHOTOGRAPHS.config | {"norm_layer": partial(nn.LayerNorm, eps=1e-6), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SCORED, SHOWN = 128, 3  # held-out tiles in a score and in a picture

Pictures = dict[str, Tensor]  # result of each method, (N, 3, SIDE, SIDE) fp32 in 0..255
Damage = Callable[[Tensor, torch.Generator], Tensor]  # clean (N, 3, SIDE, SIDE) fp32 in 0..255 -> damaged, of the same kind


def stream(tiles: images.ImageSet, seed: int) -> Iterator[Tensor]:
    """Yield endless batches (BATCH, 3, SIDE, SIDE) uint8 of training tiles."""
    return images.batches(tiles, SIDE, BATCH, torch.Generator().manual_seed(seed), flip=True)


def pretrained(tiles: images.ImageSet, steps: int, seed: int) -> tuple[MAE, MAE]:
    """Return an MAE after `steps` steps at a mask ratio of 75 %, and the initial MAE."""
    torch.manual_seed(seed)
    model = MAE(**MODEL)
    untrained = copy.deepcopy(model)
    train_loop(model, stream(tiles, seed), title="pre-training", steps=steps, lr=3e-3, mask_ratio=0.75)
    return model.eval(), untrained


def held_out(tiles: images.ImageSet) -> Tensor:
    """Return evenly spaced held-out tiles, (SCORED, 3, SIDE, SIDE) fp32 in 0..255."""
    return tiles.images[tiles.held_out[torch.linspace(0, len(tiles.held_out) - 1, SCORED).long()]].float()


def psnr(pictures: Tensor, clean: Tensor, where: Tensor | None = None) -> float:
    """Return the mean peak signal-to-noise ratio in dB of pictures (N, C, H, W) in 0..255.

    where    (H, W) bool: the pixels that count; None for all
    """
    error = (pictures.clamp(0, 255) - clean).square()
    error = error.flatten(2) if where is None else error[:, :, where]
    return (20 * torch.tensor(255.0).log10() - 10 * error.mean(dim=(1, 2)).log10()).mean().item()


def median_filter(pictures: Tensor) -> Tensor:
    """Return the median of each 3 x 3 neighbourhood per channel; the border is mirrored."""
    N, C, H, W = pictures.shape
    neighbours = F.unfold(F.pad(pictures, (1, 1, 1, 1), mode="reflect"), 3)
    return neighbours.view(N, C, 9, H, W).median(dim=2).values


class Restorer(nn.Module):
    """An MAE that encodes the whole damaged picture and decodes its correction."""

    def __init__(self, mae: MAE):
        super().__init__()
        self.mae = mae
        nn.init.zeros_(mae.decoder_pred.weight)  # the initial correction is zero
        nn.init.zeros_(mae.decoder_pred.bias)

    def forward(self, pictures: Tensor) -> Tensor:
        """Restore pictures (N, C, H, W) fp32 in 0..255."""
        pixels = pictures / 127.5 - 1
        tokens = self.mae.encode(pixels)
        in_order = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)  # nothing is masked
        return (pixels + self.mae.unpatchify(self.mae.forward_decoder(tokens, in_order)) + 1) * 127.5


def fine_tuned(mae: MAE, tiles: images.ImageSet, damage: Damage, steps: int, seed: int) -> Restorer:
    """Train encoder and decoder to predict the clean pixels of damaged tiles."""
    restorer, peak = Restorer(mae).train(), 2e-3
    optimizer, generator = adamw(restorer, peak), torch.Generator().manual_seed(seed)
    for step, batch in zip(range(steps), stream(tiles, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, steps // 10, peak)
        clean = batch.float()
        loss = F.mse_loss(restorer(damage(clean, generator)) / 127.5, clean / 127.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return restorer.eval()


@torch.no_grad()
def restored(restorer: Restorer, damaged: Tensor) -> Tensor:
    return torch.cat([restorer(batch) for batch in damaged.split(64)]).clamp(0, 255)


def restore(
    damage: Damage, baselines: dict[str, Callable[[Tensor], Tensor]], *, pretrain_steps: int, steps: int, seed: int
) -> Pictures:
    """Return held-out tiles: damaged, as each method restores them, and clean."""
    tiles = images.photographs(SIDE)
    clean = held_out(tiles)
    damaged = damage(clean, torch.Generator().manual_seed(seed + 1))
    pictures = {"damaged": damaged} | {name: method(damaged) for name, method in baselines.items()}
    mae, untrained = pretrained(tiles, pretrain_steps, seed)
    for name, start in (("from scratch", untrained), ("pre-trained", mae)):
        pictures[name] = restored(fine_tuned(start, tiles, damage, steps, seed), damaged)
    return pictures | {"clean": clean}


def scores(pictures: Pictures, where: Tensor | None = None) -> dict[str, float]:
    return {name: psnr(made, pictures["clean"], where) for name, made in pictures.items() if name != "clean"}


def save_strip(pictures: Pictures, path: Path) -> None:
    """Draw SHOWN held-out tiles, one per row; the columns are the methods."""
    from PIL import Image

    rows = torch.linspace(0, len(pictures["clean"]) - 1, SHOWN + 2)[1:-1].long()  # SHOWN evenly spaced rows
    strip = torch.cat([F.pad(made[rows], (1, 1, 1, 1), value=255.0) for made in pictures.values()], dim=3)
    image = torch.cat(list(strip), dim=1).clamp(0, 255).round().to(torch.uint8)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def parser(description: str, pretrain_steps: int, steps: int | None = None) -> Parser:
    """Return a parser with the shared flags, and --steps for examples that fine-tune."""
    flags = Parser(description=description)
    flags.add_argument("--pretrain_steps", type=int, default=pretrain_steps)
    if steps is not None:
        flags.add_argument("--steps", type=int, default=steps, help="steps of fine-tuning, for each of the two models")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--picture", type=Path, help="PNG to write, with held-out tiles of each method")
    return flags


def report(pictures: Pictures, path: Path | None = None, where: Tensor | None = None) -> None:
    """Print the scores, and write the pictures to `path` if given."""
    print(f"\n{len(pictures['clean'])} held-out tiles{'' if where is None else ', the pixels of the hole'}:\n")
    print(f"{'method':<16}{'PSNR, dB':>10}")
    for name, decibels in scores(pictures, where).items():
        print(f"{name:<16}{decibels:>10.2f}")
    if path:
        save_strip(pictures, path)
