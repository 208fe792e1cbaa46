"""Train maefast and the reference from one seed on the same real images, and draw both loss curves.

    python benchmarks/loss_curves.py [--steps 200] [--output docs]

writes loss_curves.png and loss_curves.json, in fp32 and under bf16 autocast.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import maefast
from maefast.reference import ReferenceMAE

SIZES = {"img_size": 64, "patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3}
SIZES |= {"decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4}
SIZES |= {"norm_layer": partial(nn.LayerNorm, eps=1e-6), "norm_pix_loss": True}


def crops(count: int, batch: int, seed: int) -> list[Tensor]:
    """Return `count` batches (batch, 3, 64, 64) of normalised random crops of two photographs."""
    from sklearn.datasets import load_sample_images

    photographs = [torch.tensor(image).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        images = []
        for _ in range(batch):
            photograph = photographs[int(torch.randint(len(photographs), (), generator=generator))]
            top = int(torch.randint(photograph.shape[1] - 64, (), generator=generator))
            left = int(torch.randint(photograph.shape[2] - 64, (), generator=generator))
            images.append(photograph[:, top : top + 64, left : left + 64])
        batches.append((torch.stack(images) - 0.45) / 0.25)
    return batches


def train(model: nn.Module, batches: list[Tensor], autocast: bool) -> list[float]:
    """Return the loss of each step of AdamW (0.9, 0.95); seed i draws the mask of step i."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    losses = []
    for step, imgs in enumerate(batches):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(imgs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def curves(steps: int, batch: int = 32) -> dict[str, dict[str, list[float]]]:
    """Return {"fp32" | "bf16 autocast": {"reference" | "maefast": losses}}."""
    batches = crops(steps, batch, seed=0)
    result: dict[str, dict[str, list[float]]] = {}
    for precision in ("fp32", "bf16 autocast"):
        result[precision] = {}
        for name, model_class in (("reference", ReferenceMAE), ("maefast", maefast.MAE)):
            torch.manual_seed(0)
            result[precision][name] = train(model_class(**SIZES), batches, autocast=precision != "fp32")
    return result


def largest_difference(losses: dict[str, list[float]]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(losses["reference"], losses["maefast"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    options = parser.parse_args()
    result = curves(options.steps)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(result), figsize=(10, 3.6), sharey=True)
    for axis, (precision, losses) in zip(axes, result.items(), strict=True):
        axis.plot(losses["reference"], color="0.6", linewidth=4, label="reference")
        axis.plot(losses["maefast"], color="tab:red", linewidth=1.2, label="maefast")
        axis.set_title(f"{precision}: largest relative difference {largest_difference(losses):.1e}", fontsize=10)
        axis.set_xlabel("step")
        axis.legend()
    axes[0].set_ylabel("loss")
    figure.tight_layout()
    options.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output / "loss_curves.png", dpi=110)
    rounded = {p: {name: [round(v, 7) for v in losses] for name, losses in pair.items()} for p, pair in result.items()}
    (options.output / "loss_curves.json").write_text(json.dumps(rounded) + "\n")
    for precision, losses in result.items():
        print(f"{precision}: {options.steps} steps, largest relative difference {largest_difference(losses):.1e}")


if __name__ == "__main__":
    main()
