"""Inpainting with a pre-trained MAE, against interpolation. Under two minutes on two cores.

    python examples/inpaint.py [--hole 16] [--pretrain_steps 400] [--seed 0] [--picture inpaint.png]

Needs maefast[demo]. The hole is a square in the middle of each tile, made of whole patches. Nothing
is fine-tuned: `mask=` says which patches are missing, and `reconstruct` fills them in. What stands
in the hole is never read; here it is grey. The smooth filling is what a stretched membrane would
give: each missing pixel is the mean of its neighbours. docs/restoration.md has the figures.
"""

import torch
import torch.nn.functional as F
from restoration import MODEL, SIDE, Pictures, held_out, parser, pretrained, report
from torch import Tensor

from maefast import MAE
from maefast.train.demo import images

PATCH = MODEL["patch_size"]


def square_hole(side: int) -> Tensor:
    """Return a hole (SIDE, SIDE) bool, True in the middle."""
    if side % (2 * PATCH) or not 0 < side < SIDE:
        reason = "so that the hole consists of whole patches"
        raise ValueError(f"side must be a multiple of {2 * PATCH} below {SIDE}, {reason}; it is {side}")
    hole = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    edge = (SIDE - side) // 2
    hole[edge : SIDE - edge, edge : SIDE - edge] = True
    return hole


def removed_patches(hole: Tensor) -> Tensor:
    """Return (L,) bool of the patches in row-major order, True if any pixel is missing."""
    return F.max_pool2d(hole[None, None].float(), PATCH).flatten().bool()


def mean_filling(damaged: Tensor, hole: Tensor) -> Tensor:
    """Fill the hole with the mean colour of the other pixels."""
    colour = damaged[:, :, ~hole].mean(dim=2)
    return torch.where(hole, colour[:, :, None, None], damaged)


def smooth_filling(damaged: Tensor, hole: Tensor) -> Tensor:
    """Solve Laplace's equation: each missing pixel is the mean of its four neighbours."""
    cross = torch.tensor([[0.0, 0.25, 0.0], [0.25, 0.0, 0.25], [0.0, 0.25, 0.0]]).view(1, 1, 3, 3)

    def neighbours(pictures: Tensor) -> Tensor:
        """Return the mean of each missing pixel's neighbours, (N C, missing pixels)."""
        return F.conv2d(pictures.flatten(0, 1)[:, None], cross, padding=1)[:, 0, hole]

    count = int(hole.sum())
    alone = torch.zeros(count, 1, *hole.shape)
    alone[:, 0, hole] = torch.eye(count)
    known = neighbours(torch.where(hole, torch.zeros(()), damaged))
    filling = torch.linalg.solve(torch.eye(count) - neighbours(alone).T, known.T)
    out = damaged.clone()
    out[:, :, hole] = filling.T.reshape(*damaged.shape[:2], count)
    return out


@torch.no_grad()
def inpainted(model: MAE, damaged: Tensor, hole: Tensor) -> Tensor:
    mask = removed_patches(hole).expand(len(damaged), -1)
    return model.reconstruct(damaged.to(torch.uint8), mask=mask)


def run(hole: int, pretrain_steps: int, seed: int) -> tuple[Pictures, Tensor]:
    """Return the held-out tiles as each method fills them, and the hole."""
    where, tiles = square_hole(hole), images.photographs(SIDE)
    clean = held_out(tiles)
    damaged = torch.where(where, torch.tensor(128.0), clean)
    mae, _ = pretrained(tiles, pretrain_steps, seed)
    pictures = {
        "damaged": damaged,
        "mean colour": mean_filling(damaged, where),
        "smooth filling": smooth_filling(damaged, where),
        "MAE": inpainted(mae, damaged, where),
        "clean": clean,
    }
    return pictures, where


def main() -> None:
    flags = parser(__doc__.split("\n\n")[0], pretrain_steps=400)
    flags.add_argument("--hole", type=int, default=16, help="side of the hole in pixels")
    arguments = vars(flags.parse_args())
    path = arguments.pop("picture")
    pictures, where = run(**arguments)
    report(pictures, path, where)


if __name__ == "__main__":
    main()
