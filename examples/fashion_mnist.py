"""The baseline on pixels and the picture of the curves in docs/fashion_mnist.md.

python examples/fashion_mnist.py pixels DATA                       # logistic regression
python examples/fashion_mnist.py curves OUT.png NAME=LOG.TXT ...   # losses of runs over their time
"""

import argparse
import json
from pathlib import Path

import torch

from maefast.train.data.open import open_images


def pixels(data: Path) -> None:
    """Fit logistic regression to standardised pixels; a held-out tenth chooses the L2 penalty."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (tests, truth) = (flattened(data, split) for split in ("train", "test"))
    held_out = len(x) // 10

    def fitted(count: int, strength: float):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=100, tol=1e-3))
        return model.fit(x[:count], y[:count])

    scores = {strength: fitted(-held_out, strength).score(x[-held_out:], y[-held_out:]) for strength in (1e-3, 1e-2)}
    best = max(scores, key=scores.__getitem__)
    correct = int((fitted(len(x), best).predict(tests) == truth).sum())
    print(f"C {best:g}: top-1 {correct / len(truth):.4f} ({correct} of {len(truth)} images)")


def flattened(data: Path, split: str):
    """Return pixels (N, H·W) in 0..1 and labels (N,), as NumPy arrays."""
    images = open_images(data, split)
    stored = torch.stack([images.read(index) for index in range(len(images))])
    return (stored.flatten(1).float() / 255).numpy(), images.labels.numpy()


def curves(out: Path, logs: list[str]) -> None:
    """Draw the loss of each epoch over the minutes of the run, one curve for each NAME=LOG.TXT."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), dpi=110, layout="constrained")
    axis = figure.subplots()
    for name, _, path in (log.partition("=") for log in logs):
        records = [json.loads(line) for line in Path(path).read_text().splitlines()]
        axis.plot([record["seconds"] / 60 for record in records], [record["train_loss"] for record in records], ".-", label=name)
    axis.set(xlabel="minutes", ylabel="loss, mean of the epoch")
    axis.legend()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pixels").add_argument("data", type=Path)
    plot = commands.add_parser("curves")
    plot.add_argument("out", type=Path)
    plot.add_argument("logs", nargs="+", metavar="NAME=LOG.TXT")
    arguments = parser.parse_args()
    if arguments.command == "pixels":
        pixels(arguments.data)
    else:
        curves(arguments.out, arguments.logs)


if __name__ == "__main__":
    main()
