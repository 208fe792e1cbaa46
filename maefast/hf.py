"""transformers' ViTMAEForPreTraining on maefast's kernels: the same configuration, forward, outputs and checkpoints.

Importing this does not import transformers; `from_pretrained` does.
"""

import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import ops
from .checkpoint import load
from .checkpoint.candidates import official_names
from .checkpoint.files import WEIGHTS, write_safetensors
from .checkpoint.layouts import transformers_names
from .model import MAE


class ViTMAEForPreTrainingOutput(NamedTuple):
    """By name (`output.loss`, `output["loss"]`) and by position, as transformers' own."""

    loss: Tensor  # ()
    logits: Tensor  # (N, L, P), channel-fastest patch order
    mask: Tensor  # (N, L), 1 = removed
    ids_restore: Tensor  # (N, L)

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else tuple.__getitem__(self, key)

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(self)


class ViTMAEForPreTraining(nn.Module):
    """transformers' class of this name around a `maefast.MAE`, which is `.mae`; its state_dict has transformers' published names.

    config    a transformers.ViTMAEConfig, or any object with its attributes

    A fresh model is initialised as the official one is, sin-cos positions included (transformers 5.23 leaves them at zero).
    Raises ValueError for what the model has no place for: dropout, qkv without bias, an activation other than GELU, MLPs of
    different ratios in encoder and decoder.
    """

    main_input_name = "pixel_values"

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.mae = MAE(
            img_size=_size(config.image_size),
            patch_size=_size(config.patch_size),
            in_chans=config.num_channels,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            decoder_embed_dim=config.decoder_hidden_size,
            decoder_depth=config.decoder_num_hidden_layers,
            decoder_num_heads=config.decoder_num_attention_heads,
            mlp_ratio=_mlp_ratio(config),
            norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
            norm_pix_loss=config.norm_pix_loss,
        )
        self.register_state_dict_post_hook(_to_transformers_names)
        self.register_load_state_dict_pre_hook(_to_own_names)

    def forward(
        self,
        pixel_values: Tensor,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        *,
        return_dict: bool = True,
    ) -> "ViTMAEForPreTrainingOutput | tuple[Tensor, ...]":
        """pixel_values (N, C, H, W), noise (N, L) fp32, which decides the mask in place of a fresh draw. config.mask_ratio of the
        patches are removed.

        Raises ValueError for interpolate_pos_encoding: a model for another size is made with that `image_size` in its
        configuration, and from_pretrained fits the positions. `model.mae` takes more, such as return_pred=False.
        """
        if interpolate_pos_encoding:
            raise ValueError("interpolate_pos_encoding must be False: give from_pretrained a config of that image_size instead")
        L = self.mae.patch_embed.num_patches
        if noise is None:
            noise = ops.masking_noise(pixel_values.shape[0], L, pixel_values.device)
        loss, logits, mask = self.mae(pixel_values, self.config.mask_ratio, noise=noise)
        ids_restore = ops.random_masking(noise, MAE._len_keep(self.config.mask_ratio, L))[1]
        output = ViTMAEForPreTrainingOutput(loss, logits, mask, ids_restore)
        return output if return_dict else output.to_tuple()

    def patchify(self, pixel_values: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, P), channel-fastest patch order."""
        return self.mae.patchify(pixel_values)

    def unpatchify(self, patchified_pixel_values: Tensor) -> Tensor:
        """The inverse of patchify."""
        return self.mae.unpatchify(patchified_pixel_values)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, config: Any = None) -> "ViTMAEForPreTraining":
        """A model with the weights of a checkpoint, of any layout that `maefast.checkpoint` reads.

        config    a ViTMAEConfig; by default that in the folder `path`. Warns as `MAE.from_pretrained`
        Raises as `maefast.checkpoint.load`, and RuntimeError where a configuration must be read and transformers is missing.
        """
        if config is None:
            config = _configuration_class().from_pretrained(path)
        model = cls(config)
        for warning in load(model.mae, path).warnings:
            warnings.warn(f"{path}: {warning}", stacklevel=2)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors to `folder`, made where there is none; transformers' class reads them."""
        self.config.save_pretrained(folder)
        write_safetensors(transformers_names(self.mae.state_dict()), Path(folder) / WEIGHTS)


def _configuration_class() -> Any:
    try:
        from transformers import ViTMAEConfig
    except ImportError as error:
        raise RuntimeError("config must be given, or transformers be installed to read it: pip install transformers") from error
    return ViTMAEConfig


def _size(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def _mlp_ratio(config: Any) -> float:
    """The ratio of both MLPs; raises ValueError where they differ, and for whatever else the model has no place for."""
    for name, wanted in (
        ("hidden_act", "gelu"),
        ("hidden_dropout_prob", 0.0),
        ("attention_probs_dropout_prob", 0.0),
        ("qkv_bias", True),
    ):
        if (value := getattr(config, name, wanted)) != wanted:
            raise ValueError(f"config.{name} must be {wanted!r} for maefast; it is {value!r}")
    ratio = config.intermediate_size / config.hidden_size
    if config.decoder_intermediate_size != int(config.decoder_hidden_size * ratio):
        raise ValueError(
            f"config must have MLPs of one ratio in encoder and decoder for maefast; they are {config.intermediate_size} / "
            f"{config.hidden_size} and {config.decoder_intermediate_size} / {config.decoder_hidden_size}"
        )
    return ratio


def _to_transformers_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    own = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(f"{prefix}mae.")}
    named = transformers_names({name.removeprefix(f"{prefix}mae."): tensor for name, tensor in own.items()})
    state_dict.update({prefix + name: tensor for name, tensor in named.items()})


def _to_own_names(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    theirs = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith((f"{prefix}vit.", f"{prefix}decoder."))}
    if theirs:
        named = official_names({name.removeprefix(prefix): t for name, t in theirs.items()}, Path("the state_dict"))
        state_dict.update({f"{prefix}mae.{name}": tensor for name, tensor in named.items()})
