"""What the paper varies (He et al. 2022, table 1, figures 5 and 6), as changes of Options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..pretrain.options import Options

# top-1 on ImageNet, ViT-L/16, 800 epochs: fine-tuned, linear probe
Paper = tuple[float | None, float | None]
DEFAULT: Paper = (84.9, 73.5)
DEPTHS: dict[int, Paper] = {1: (84.8, 65.5), 2: (84.9, 70.0), 4: (84.9, 71.9), 8: DEFAULT, 12: (84.4, 73.3)}
WIDTHS: dict[int, Paper] = {128: (84.9, 69.1), 256: (84.8, 71.3), 512: DEFAULT, 768: (84.4, 73.1), 1024: (84.3, 73.1)}
# Figure 5 is a plot; the text says that 75 % is best.
RATIOS: dict[float, Paper] = {0.25: (None, None), 0.5: (None, None), 0.75: DEFAULT, 0.9: (None, None)}


@dataclass(frozen=True)
class Row:
    """One line of the table: what it changes, the value as shown, the paper's value and figures."""

    axis: str
    value: str
    changes: dict[str, Any]
    paper_value: str
    paper: Paper

    @property
    def name(self) -> str:
        """Return the name of its folder, shared by rows with the same change."""
        return ",".join(f"{name}={value}" for name, value in self.changes.items()) or "default"

    def options(self, base: Options) -> Options:
        return replace(base, **{"norm_pix_loss": False} | self.changes)  # norm_pix_loss follows from the target


def rows_of(axes: Sequence[str], base: Options) -> list[Row]:
    """Return the rows of some of AXES. The decoder's sizes are the paper's, scaled from its default
    (8 blocks, a width of 512) to base's. Equal sizes give one row."""
    return [row for axis in axes for row in _distinct(axis, base)]


def _distinct(axis: str, base: Options) -> list[Row]:
    rows = dict[str, Row]()
    for value, changes, paper_value, paper in AXES[axis](base):
        changed = {name: new for name, new in changes.items() if getattr(base, name) != new}
        row = Row(axis, value, changed, paper_value, paper)
        if row.name not in rows or paper == DEFAULT:
            rows[row.name] = row
    return list(rows.values())


_Entries = list[tuple[str, dict[str, Any], str, Paper]]


def _decoder(option: str, figures: dict[int, Paper]) -> Callable[[Options], _Entries]:
    def entries(base: Options) -> _Entries:
        (paper_default,) = (value for value, paper in figures.items() if paper == DEFAULT)
        sizes = {value: max(1, round(value * getattr(base, option) / paper_default)) for value in figures}
        return [(str(size), {option: size}, str(value), figures[value]) for value, size in sizes.items()]

    return entries


def _named(*entries: tuple[str, dict[str, Any], Paper]) -> Callable[[Options], _Entries]:
    return lambda base: [(value, changes, value, paper) for value, changes, paper in entries]


AXES: dict[str, Callable[[Options], _Entries]] = {
    "decoder_depth": _decoder("decoder_depth", DEPTHS),
    "decoder_width": _decoder("decoder_embed_dim", WIDTHS),
    "mask_token": _named(
        ("in the encoder too", {"mask_tokens_in_encoder": True}, (84.2, 59.6)),
        ("in the decoder alone", {"mask_tokens_in_encoder": False}, DEFAULT),
    ),
    "target": _named(
        ("pixel", {"target": "pixel"}, DEFAULT),
        ("norm", {"target": "norm"}, (85.4, 73.9)),
        ("pca", {"target": "pca"}, (84.6, 72.3)),
    ),
    "augmentation": _named(
        ("none", {"augment": "none"}, (84.0, 65.7)),
        ("crop", {"augment": "crop"}, (84.7, 73.1)),
        ("rrc", {"augment": "rrc"}, DEFAULT),
        ("rrc+jitter", {"augment": "rrc+jitter"}, (84.3, 71.9)),
    ),
    "sampling": _named(
        ("random 75 %", {"sampler": "random", "mask_ratio": 0.75}, DEFAULT),
        ("block 50 %", {"sampler": "block", "mask_ratio": 0.5}, (83.9, 72.3)),
        ("block 75 %", {"sampler": "block", "mask_ratio": 0.75}, (82.8, 63.9)),
        ("grid 75 %", {"sampler": "grid", "mask_ratio": 0.75}, (84.0, 66.0)),
    ),
    "mask_ratio": _named(*((f"{ratio:.0%}".replace("%", " %"), {"mask_ratio": ratio}, paper) for ratio, paper in RATIOS.items())),
}
