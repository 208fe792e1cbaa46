"""Segmentation from a few labelled pictures, of frozen encoders. Under a minute on two cores.

    python examples/segmentation.py [--pretrain_steps 400] [--steps 200] [--labelled 64] [--seed 0]

Needs maefast[demo]. The pictures are tiles of scikit-learn's two photographs, each with one of its
handwritten digits painted over it. The label of a pixel is whether ink covers it. Digits and parts
of the photographs that are scored are never trained on.

An MAE is pre-trained on such pictures without labels. Then a SimpleFeaturePyramid and a classifier
of its maps learn from few labelled pictures to read the frozen features of that encoder, and those
of an untrained one.

Ink is a local cue, which random features carry too: after 400 steps of pre-training the untrained
encoder is still ahead, with a mean IoU of 0.64 to 0.65 against 0.59 to 0.62 on seeds 0, 1 and 2.
`maefast demo` shows what is gained where shapes count.
"""

import copy
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maefast import MAE, SimpleFeaturePyramid, VisionTransformer
from maefast.cli.parser import Parser
from maefast.train.demo import images
from maefast.train.demo.loop import train_loop
from maefast.train.optim import adamw
from maefast.train.schedule import warmup_cosine

SIDE, CLASSES = 64, 2
ENCODER = {"img_size": SIDE, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}
ENCODER |= {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}
DECODER = {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 2}


class Scenes:
    """Endless pictures of digits painted on photographs, from training or held-out images."""

    def __init__(self, seed: int):
        self.digits, self.photographs = images.digits(seed), images.photographs(SIDE)

    def draw(self, count: int, generator: torch.Generator, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Draw pictures (count, 3, 64, 64) uint8 and labels (count, 64, 64) int64, 1 for ink."""

        def choice(ids: Tensor) -> Tensor:
            return ids[torch.randint(len(ids), (count,), generator=generator)]

        digits, photographs = self.digits, self.photographs
        ids = choice(digits.held_out if held_out else digits.train)
        tiles = photographs.images[choice(photographs.held_out if held_out else photographs.train)].float()
        ink = torch.zeros(count, 1, SIDE, SIDE)
        for i, digit in enumerate(digits.images[ids].float() / 255):
            side = int(torch.randint(28, 49, (), generator=generator))
            top, left = torch.randint(SIDE - side + 1, (2,), generator=generator).tolist()
            large = F.interpolate(digit[None], (side, side), mode="bicubic", align_corners=False)[0]
            ink[i, :, top : top + side, left : left + side] = large.clamp(0, 1)
        colour = 255 * torch.rand(count, 3, 1, 1, generator=generator)
        opacity = ink * (0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator))
        pictures = (tiles * (1 - opacity) + colour * opacity).round().to(torch.uint8)
        return pictures, (ink[:, 0] > 0.5).long()

    def unlabelled(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        while True:
            yield self.draw(batch_size, generator)[0]


class Head(nn.Module):
    """A head that resizes the maps of a pyramid to the finest one, adds and classifies them."""

    def __init__(self, dim: int, width: int = 32):
        super().__init__()
        self.pyramid = SimpleFeaturePyramid(dim, width)
        self.classifier = nn.Conv2d(width, CLASSES, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """features (N, D, h, w) -> (N, CLASSES, SIDE, SIDE)."""
        finest, *coarser = self.pyramid(features)
        total = finest + sum(F.interpolate(m, finest.shape[2:], mode="bilinear") for m in coarser)
        return F.interpolate(self.classifier(F.gelu(total)), (SIDE, SIDE), mode="bilinear")


class Score(NamedTuple):
    accuracy: float  # of the pixels
    mean_iou: float  # intersection over union of each class, averaged over classes


def train(head: Head, features: Tensor, labels: Tensor, steps: int, generator: torch.Generator) -> None:
    peak, batch_size = 2e-3, 16
    optimizer = adamw(head, peak)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, steps // 10, peak)
        ids = torch.randint(len(features), (batch_size,), generator=generator)
        loss = F.cross_entropy(head(features[ids]), labels[ids])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def score(head: Head, features: Tensor, labels: Tensor) -> Score:
    predicted = torch.cat([head(batch).argmax(dim=1) for batch in features.split(64)])
    confusion = torch.bincount((labels * CLASSES + predicted).flatten(), minlength=CLASSES**2).view(CLASSES, CLASSES).double()
    hits = confusion.diag()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - hits
    return Score((hits.sum() / confusion.sum()).item(), (hits / union).mean().item())


def run(pretrain_steps: int, steps: int, labelled: int, seed: int) -> dict[str, Score]:
    """Return scores on 256 held-out pictures of the pre-trained and the untrained encoder."""
    scenes = Scenes(seed)
    generator = torch.Generator().manual_seed(seed)
    pictures, labels = scenes.draw(labelled, generator)
    held_out, truth = scenes.draw(256, generator, held_out=True)

    torch.manual_seed(seed)
    mae = MAE(**ENCODER, **DECODER)
    weights = {"untrained": copy.deepcopy(mae.state_dict())}
    stream = scenes.unlabelled(64, generator)
    train_loop(mae, stream, title="pre-training", steps=pretrain_steps, lr=2e-3, mask_ratio=0.75)
    weights["pre-trained"] = mae.state_dict()

    share = (truth == 0).double().mean().item()
    scores = {"no ink anywhere": Score(share, share / CLASSES)}
    for name, state in weights.items():
        encoder = VisionTransformer(**ENCODER, num_classes=0).eval()
        encoder.load_state_dict(state, strict=False)  # all but the decoder
        torch.manual_seed(seed)
        head = Head(encoder.embed_dim)
        with torch.no_grad():
            (features,), (held_out_features,) = encoder.features(pictures), encoder.features(held_out)
        train(head, features, labels, steps, torch.Generator().manual_seed(seed))
        scores[name] = score(head, held_out_features, truth)
    return scores


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pretrain_steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=200, help="training steps of the head, for each encoder")
    parser.add_argument("--labelled", type=int, default=64, help="number of labelled pictures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"\n{'encoder':<16}{'pixel accuracy':>16}{'mean IoU':>10}")
    for name, (accuracy, mean_iou) in run(**vars(arguments)).items():
        print(f"{name:<16}{accuracy:>16.3f}{mean_iou:>10.3f}")


if __name__ == "__main__":
    main()
