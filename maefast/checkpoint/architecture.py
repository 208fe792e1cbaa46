"""The architecture of a checkpoint, from the shapes of its tensors and from its configuration."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..init import pair
from . import statistics
from .candidates import Weights
from .files import CheckpointError, listed
from .positions import Grid, grid_of

Shape = tuple[int, ...]

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # of the encoders of the factories, by width
DECODER_HEADS = {512: 16}
OFFICIAL_MODELS = re.compile(r"mae_vit_(base|large|huge)_patch\d+(_dec512d8b)?")
OFFICIAL_EPS, TRANSFORMERS_EPS, CLASS_EPS = 1e-6, 1e-12, 1e-5
MLPS = ("blocks.0.mlp.fc1.weight", "decoder_blocks.0.mlp.fc1.weight")
OUR_MODEL_TYPE, THEIR_MODEL_TYPE = "maefast", "vit_mae"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Facts:
    """Settings that a checkpoint stores beside its tensors; None if it does not."""

    num_heads: int | None = None
    decoder_num_heads: int | None = None
    img_size: tuple[int, int] | None = None
    norm_pix_loss: bool | None = None
    layer_norm_eps: float | None = None
    mask_ratio: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "decoder_num_heads"):
            heads = getattr(self, name)
            if heads is not None and (not isinstance(heads, int) or heads < 1):
                raise ValueError(f"{name} must be a positive whole number; it is {heads!r}")
        if not isinstance(self.norm_pix_loss, bool | None):
            raise ValueError(f"norm_pix_loss must be true or false; it is {self.norm_pix_loss!r}")
        if self.layer_norm_eps is not None and not 0 <= self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps must be a number, 0 or more; it is {self.layer_norm_eps!r}")
        if self.mask_ratio is not None and not (_is_number(self.mask_ratio) and 0 <= self.mask_ratio < 1):
            raise ValueError(f"mask_ratio must be in [0, 1); it is {self.mask_ratio!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and not (isinstance(values, list | tuple) and all(map(_is_number, values))):
                raise ValueError(f"{name} must be a list of numbers; it is {values!r}")
        if (self.mean is None) != (self.std is None) or not all(value > 0 for value in self.std or ()):
            raise ValueError(f"mean and std must be given together, std positive; they are {self.mean} and {self.std}")


@dataclass(frozen=True)
class Architecture:
    """MAE's arguments, with layer_norm_eps in place of norm_layer; unknown heads are None."""

    img_size: tuple[int, int]
    patch_size: tuple[int, int]
    in_chans: int
    embed_dim: int
    depth: int
    num_heads: int | None
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int | None
    mlp_ratio: float
    norm_pix_loss: bool
    layer_norm_eps: float
    mean: list[float] | None
    std: list[float] | None

    @property
    def grid(self) -> Grid:
        return self.img_size[0] // self.patch_size[0], self.img_size[1] // self.patch_size[1]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of MAE's constructor."""
        arguments = asdict(self)
        return arguments | {"norm_layer": partial(nn.LayerNorm, eps=arguments.pop("layer_norm_eps"))}

    def require_heads(self, path: Path, given: Collection[str] = ()) -> None:
        """Raise CheckpointError for heads that are unknown, or do not divide the width."""
        for name, width, known in (
            ("num_heads", self.embed_dim, HEADS),
            ("decoder_num_heads", self.decoder_embed_dim, DECODER_HEADS),
        ):
            heads = getattr(self, name)
            if heads is not None and width % heads and name not in given:
                raise CheckpointError(f"{name} of {path} is {heads}, which does not divide the width {width}")
            if heads is None and name not in given:
                widths = ", ".join(map(str, known))
                raise CheckpointError(
                    f"{name} must be given: {path} does not store it, and {width} is not among the widths that imply it, {widths}"
                )

    def shapes(self, decoder: bool) -> dict[str, Shape]:
        """Return the names and shapes of MAE's state_dict, or only its encoder's."""
        (rows, columns), (ph, pw), D, width = self.grid, self.patch_size, self.embed_dim, self.decoder_embed_dim
        tokens = 1 + rows * columns
        shapes: dict[str, Shape] = {"cls_token": (1, 1, D), "pos_embed": (1, tokens, D)}
        if decoder:
            shapes |= {"mask_token": (1, 1, width), "decoder_pos_embed": (1, tokens, width)}
        shapes |= _affine("patch_embed.proj", D, self.in_chans, ph, pw)
        shapes |= self._blocks("blocks", self.depth, D) | _affine("norm", D)
        if decoder:
            shapes |= _affine("decoder_embed", width, D)
            shapes |= self._blocks("decoder_blocks", self.decoder_depth, width) | _affine("decoder_norm", width)
            shapes |= _affine("decoder_pred", ph * pw * self.in_chans, width)
        return shapes

    def checked(self, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
        """Return the tensors in official order. Raises CheckpointError unless names and shapes are
        those of this architecture, with its whole decoder or none."""
        has_decoder = any(map(is_decoder, tensors))
        shapes = self.shapes(has_decoder)
        strange, lacking = [name for name in tensors if name not in shapes], [name for name in shapes if name not in tensors]
        if strange or lacking:
            decoder = ["the decoder"] if strange and not has_decoder else []
            raise CheckpointError(f"{path} is no Masked Autoencoder: {misfit(strange, decoder + lacking)}")
        for name, shape in shapes.items():
            if tensors[name].shape != shape:
                found = tuple(tensors[name].shape)
                raise CheckpointError(f"{name} of {path} must be {shape} beside its other tensors; its shape is {found}")
        return {name: tensors[name] for name in shapes}

    def _blocks(self, name: str, depth: int, D: int) -> dict[str, Shape]:
        hidden = int(D * self.mlp_ratio)
        shapes: dict[str, Shape] = {}
        for i in range(depth):
            block = f"{name}.{i}"
            shapes |= _affine(f"{block}.norm1", D) | _affine(f"{block}.attn.qkv", 3 * D, D) | _affine(f"{block}.attn.proj", D, D)
            shapes |= _affine(f"{block}.norm2", D)
            shapes |= _affine(f"{block}.mlp.fc1", hidden, D) | _affine(f"{block}.mlp.fc2", D, hidden)
        return shapes


def encoder_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of MAE that VisionTransformer also has."""
    return {name: value for name, value in arguments.items() if not name.startswith("decoder_") and name != "norm_pix_loss"}


def _affine(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def misfit(strange: list[str], lacking: list[str]) -> str:
    parts = [f"it has {listed(strange)}, for which there is no place"] if strange else []
    return ", and ".join(parts + ([f"it lacks {listed(lacking)}"] if lacking else []))


def is_decoder(name: str) -> bool:
    return name == "mask_token" or name.startswith("decoder_")


def is_head(name: str) -> bool:
    return name.startswith("head.")


def facts_of(weights: Weights, tensors: Mapping[str, Tensor]) -> Facts:
    """Return the facts in config.json or the training arguments; the layout implies eps."""
    config = weights.config
    default = Facts(layer_norm_eps=TRANSFORMERS_EPS if weights.layout == "transformers" else OFFICIAL_EPS)
    told: Any = (None, None)
    try:
        if weights.preprocessor:
            told = statistics.of_preprocessor(weights.preprocessor, _channels(tensors)) or told
        if "embed_dim" in config:  # the constructor's arguments: maefast's own
            own = {field.name: config.get(field.name) for field in fields(Facts)}
            own["img_size"] = pair(config["img_size"], "img_size")
            return Facts(**own | {"layer_norm_eps": float(config.get("layer_norm_eps", CLASS_EPS))})
        if "hidden_size" in config:
            return replace(_transformers_facts(config), mean=told[0], std=told[1])
        if "pretrained_cfg" in config or {"architecture", "input_size"} <= config.keys():  # timm's, and timm's of before
            about = config.get("pretrained_cfg", config)
            _, *size = about["input_size"]
            mean, std = statistics.of_timm(about) or told
            return replace(default, img_size=pair(tuple(size), "input_size"), mean=mean, std=std)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"the config of {weights.path} is not that of a Masked Autoencoder: {error!r}") from error
    args = weights.args
    if OFFICIAL_MODELS.fullmatch(str(args.get("model"))):
        default = replace(default, num_heads=_width_heads(tensors, "cls_token", HEADS),
                          decoder_num_heads=_width_heads(tensors, "mask_token", DECODER_HEADS))  # fmt: skip
    norm_pix_loss, mask_ratio = args.get("norm_pix_loss"), args.get("mask_ratio")
    return replace(
        default,
        norm_pix_loss=norm_pix_loss if isinstance(norm_pix_loss, bool) else None,
        mask_ratio=mask_ratio if isinstance(mask_ratio, float) and 0 <= mask_ratio < 1 else None,
        mean=told[0],
        std=told[1],
    )


def _transformers_facts(config: Mapping[str, Any]) -> Facts:
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise ValueError(f"hidden_act is {activation}, where MAE has gelu")
    return Facts(
        num_heads=config["num_attention_heads"],
        decoder_num_heads=config.get("decoder_num_attention_heads"),
        img_size=pair(config["image_size"], "image_size"),
        norm_pix_loss=config.get("norm_pix_loss"),
        layer_norm_eps=float(config.get("layer_norm_eps", TRANSFORMERS_EPS)),
        mask_ratio=config.get("mask_ratio"),
    )


def _channels(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of channels of the patch embedding; 3 without one."""
    embedding = tensors.get("patch_embed.proj.weight")
    return 3 if embedding is None or embedding.dim() != 4 else embedding.shape[1]


def _width_heads(tensors: Mapping[str, Tensor], token: str, known: Mapping[int, int]) -> int | None:
    return known.get(tensors[token].shape[-1]) if token in tensors else None


def find_grid(tensors: Mapping[str, Tensor], facts: Facts, path: Path, given: Grid | None, models: Grid | None = None) -> Grid:
    """Return the grid of stored positions: given, or in `facts`, or found by `grid_of`."""
    _, _, ph, pw = _shape(tensors, "patch_embed.proj.weight", 4, path)
    _shape(tensors, "pos_embed", 3, path)
    if given is None and facts.img_size is not None:
        given = (facts.img_size[0] // ph, facts.img_size[1] // pw)
    return grid_of(tensors["pos_embed"], given, models, path)


def infer(tensors: Mapping[str, Tensor], facts: Facts, path: Path, grid: Grid) -> Architecture:
    """Return the architecture of tensors with official names and positions of that grid. Raises
    CheckpointError if a tensor that determines a size is missing or has other dimensions."""
    embed_dim, in_chans, ph, pw = _shape(tensors, "patch_embed.proj.weight", 4, path)
    depth, decoder_depth = _depth(tensors, "blocks"), _depth(tensors, "decoder_blocks")
    for name in ("mean", "std"):
        if (values := getattr(facts, name)) is not None and len(values) != in_chans:
            raise CheckpointError(f"{name} of {path} must have {in_chans} values, one a channel; it has {len(values)}")
    decoder_embed_dim, decoder_heads = 512, facts.decoder_num_heads
    if any(map(is_decoder, tensors)):
        decoder_embed_dim = _shape(tensors, "decoder_embed.weight", 2, path)[0]
    else:  # a fresh one, of the constructor's defaults
        decoder_depth, decoder_heads = 8, DECODER_HEADS[512]
    return Architecture(
        img_size=(grid[0] * ph, grid[1] * pw),
        patch_size=(ph, pw),
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=facts.num_heads or HEADS.get(embed_dim),
        decoder_embed_dim=decoder_embed_dim,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_heads or DECODER_HEADS.get(decoder_embed_dim),
        mlp_ratio=_mlp_ratio([_shape(tensors, name, 2, path) for name in MLPS if name in tensors]),
        norm_pix_loss=bool(facts.norm_pix_loss),
        layer_norm_eps=OFFICIAL_EPS if facts.layer_norm_eps is None else facts.layer_norm_eps,
        mean=facts.mean,
        std=facts.std,
    )


def _shape(tensors: Mapping[str, Tensor], name: str, dims: int, path: Path) -> Shape:
    if name not in tensors:
        raise CheckpointError(f"{path} lacks {name}")
    if tensors[name].dim() != dims:
        raise CheckpointError(f"{name} of {path} must have {dims} dimensions; its shape is {tuple(tensors[name].shape)}")
    return tuple(tensors[name].shape)


def _depth(tensors: Mapping[str, Tensor], name: str) -> int:
    return len({key.split(".")[1] for key in tensors if key.startswith(f"{name}.")})


def _mlp_ratio(layers: list[Shape]) -> float:
    """Return a ratio with int(width * ratio) == hidden for each fc1 (hidden, width), or near."""
    if not layers:
        return 4.0
    least = max(hidden / width for hidden, width in layers)
    if all(int(width * least) == hidden for hidden, width in layers):
        return least
    return (least + min((hidden + 1) / width for hidden, width in layers)) / 2


def of_model(model: Any) -> Architecture:
    """Return the architecture of an MAE. Raises ValueError for a norm_layer other than
    nn.LayerNorm, which a config.json cannot express."""
    if type(model.norm) is not nn.LayerNorm:
        raise ValueError(f"norm_layer must be nn.LayerNorm to be saved; it is {type(model.norm).__name__}")
    heads, decoder_heads = (blocks[0].attn.num_heads if len(blocks) else 1 for blocks in (model.blocks, model.decoder_blocks))
    mean, std = (None if buffer is None else buffer.tolist() for buffer in (model.mean, model.std))
    facts = Facts(heads, decoder_heads, model.patch_embed.img_size, model.norm_pix_loss, model.norm.eps, mean=mean, std=std)
    return infer(model.state_dict(), facts, Path("the model"), model.patch_embed.grid_size)
