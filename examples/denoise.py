"""Denoising with a fine-tuned MAE, against a median filter. Under two minutes on two cores.

    python examples/denoise.py [--sigma 25] [--steps 150] [--pretrain_steps 300] [--seed 0]
    [--picture denoise.png]

Needs maefast[demo]. Noise is Gaussian, independent in each pixel and channel. A pre-trained MAE and
one from scratch learn to predict what to add to the noisy picture, with the same budget.
docs/restoration.md has the figures.
"""

import torch
from restoration import Damage, Pictures, median_filter, parser, report, restore
from torch import Tensor


def noise(sigma: float) -> Damage:
    def damage(clean: Tensor, generator: torch.Generator) -> Tensor:
        return clean + sigma * torch.randn(clean.shape, generator=generator)

    return damage


def run(sigma: float, pretrain_steps: int, steps: int, seed: int) -> Pictures:
    """sigma    standard deviation of the noise, for pixels in 0..255"""
    return restore(noise(sigma), {"median filter": median_filter}, pretrain_steps=pretrain_steps, steps=steps, seed=seed)


def main() -> None:
    flags = parser(__doc__.split("\n\n")[0], pretrain_steps=300, steps=150)
    flags.add_argument("--sigma", type=float, default=25.0, help="standard deviation of the noise, for pixels in 0..255")
    arguments = vars(flags.parse_args())
    path = arguments.pop("picture")
    report(run(**arguments), path)


if __name__ == "__main__":
    main()
