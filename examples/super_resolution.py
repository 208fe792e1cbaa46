"""Super-resolution with a fine-tuned MAE, against bicubic. Under two minutes on two cores.

    python examples/super_resolution.py [--factor 2] [--steps 150] [--pretrain_steps 300] [--seed 0]
    [--picture sr.png]

Needs maefast[demo]. Tiles are made smaller (bicubic, antialiased, rounded to 8 bits) and enlarged
again by bicubic interpolation. A pre-trained MAE and one from scratch learn to predict what to add,
with the same budget. docs/restoration.md has the figures.
"""

import torch
import torch.nn.functional as F
from restoration import Damage, Pictures, parser, report, restore
from torch import Tensor


def smaller(pictures: Tensor, factor: int) -> Tensor:
    size = (pictures.shape[2] // factor, pictures.shape[3] // factor)
    return F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255).round()


def bicubic(factor: int) -> Damage:
    """Enlarge the small picture again."""

    def damage(clean: Tensor, _: torch.Generator) -> Tensor:
        small = smaller(clean, factor)
        return F.interpolate(small, clean.shape[2:], mode="bicubic", align_corners=False).clamp(0, 255)

    return damage


def run(factor: int, pretrain_steps: int, steps: int, seed: int) -> Pictures:
    """Run the example. factor: of the side of the picture; it divides 64."""
    pictures = restore(bicubic(factor), {}, pretrain_steps=pretrain_steps, steps=steps, seed=seed)
    nearest = F.interpolate(smaller(pictures["clean"], factor), scale_factor=factor, mode="nearest")
    return {"pixels repeated": nearest, "bicubic": pictures.pop("damaged")} | pictures


def main() -> None:
    flags = parser(__doc__.split("\n\n")[0], pretrain_steps=300, steps=150)
    flags.add_argument("--factor", type=int, default=2, choices=(2, 4, 8))
    arguments = vars(flags.parse_args())
    path = arguments.pop("picture")
    report(run(**arguments), path)


if __name__ == "__main__":
    main()
