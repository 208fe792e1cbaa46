"""ViTMAEForPreTraining and ViTMAEModel."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..backbone import follow_parameters
from ..model import MAE
from .adapter import Adapter
from .capture import add_dropout
from .loading import require_transformers


class _Encoder(nn.Module):
    """The encoder of an MAE under official names, without its decoder."""

    def __init__(self, mae: MAE):
        super().__init__()
        object.__setattr__(self, "mae", mae)  # not a submodule, since it has a decoder
        self.patch_embed, self.blocks, self.norm = mae.patch_embed, mae.blocks, mae.norm
        self.cls_token, self.pos_embed = mae.cls_token, mae.pos_embed
        self.register_load_state_dict_post_hook(_share_tokens)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Encoder":
        mae: Any = self.mae
        mae._apply(fn, recurse)
        self.cls_token, self.pos_embed = mae.cls_token, mae.pos_embed
        return self


def _share_tokens(encoder: Any, _: Any) -> None:
    """Share the tokens again after load_state_dict(assign=True), which makes new parameters."""
    encoder.mae.cls_token, encoder.mae.pos_embed = encoder.cls_token, encoder.pos_embed
    follow_parameters(encoder.mae)


class ViTMAEModel(Adapter):
    """transformers' class of this name around the encoder of a `maefast.MAE`.

    config    a transformers.ViTMAEConfig, or any object with its attributes
    """

    _inner, _outer = "encoder_weights", "vit."

    def __init__(self, config: Any):
        super().__init__(config)
        self.encoder_weights = _Encoder(_mae_of(config, decoder_embed_dim=4, decoder_depth=0, decoder_num_heads=1))
        self._finish()

    @classmethod
    def _around(cls, config: Any, mae: MAE) -> "ViTMAEModel":
        """Return the encoder of `mae`, which shares its parameters."""
        model = cls.__new__(cls)
        Adapter.__init__(model, config)
        model.encoder_weights = _Encoder(mae)
        return model

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder_weights.blocks

    @property
    def layernorm(self) -> nn.Module:
        return self.encoder_weights.norm

    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return a ViTMAEModelOutput: last_hidden_state (N, 1+K, D), mask, ids_restore (N, L).
        Arguments and errors are those of ViTMAEForPreTraining.forward."""
        noise = self._noise_for(pixel_values, noise, interpolate_pos_encoding, attention_mask)
        mae = self._mae
        mae._check_images(pixel_values)
        len_keep = ops.len_keep(noise.shape[1], self.config.mask_ratio)
        with self._capturing(output_attentions, output_hidden_states) as extras:
            x, mask, ids_restore = mae._embed_kept(pixel_values, noise, len_keep)
            latent = mae._encode_tokens(x)
        output = _outputs().ViTMAEModelOutput(last_hidden_state=latent, mask=mask, ids_restore=ids_restore, **extras)
        return self._answer(output, return_dict)


class ViTMAEForPreTraining(Adapter):
    """transformers' class of this name around a `maefast.MAE`, which is `.mae`; its state_dict has
    transformers' published names.

    config    a transformers.ViTMAEConfig, or any object with its attributes

    A fresh model is initialised as the official one is.
    Raises ValueError for what the model has no place for: qkv without bias, an activation other
    than GELU, MLPs of different ratios in encoder and decoder; RuntimeError where transformers is
    missing.
    """

    _inner, _outer = "mae", ""

    def __init__(self, config: Any):
        super().__init__(config)
        self.mae = _mae_of(
            config,
            decoder_embed_dim=config.decoder_hidden_size,
            decoder_depth=config.decoder_num_hidden_layers,
            decoder_num_heads=config.decoder_num_attention_heads,
        )
        self._finish()

    @property
    def vit(self) -> ViTMAEModel:
        """The encoder, which shares the parameters."""
        return ViTMAEModel._around(self.config, self.mae).train(self.training)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return a ViTMAEForPreTrainingOutput: loss, logits (N, L, P), mask, ids_restore (N, L).

        pixel_values    (N, C, H, W)
        noise           (N, L), decides the mask in place of a fresh draw
        output_attentions, output_hidden_states    of the encoder; by default as in config
        return_dict     False: return a tuple
        Raises ValueError for interpolate_pos_encoding: give from_pretrained a config with the
        other `image_size` instead.
        """
        noise = self._noise_for(pixel_values, noise, interpolate_pos_encoding, attention_mask)
        self.mae.norm_pix_loss = bool(self.config.norm_pix_loss)
        with self._capturing(output_attentions, output_hidden_states) as extras:
            loss, logits, mask = self.mae(pixel_values, self.config.mask_ratio, noise=noise)
        len_keep = ops.len_keep(noise.shape[1], self.config.mask_ratio)
        ids_restore = ops.random_masking(noise, len_keep)[1]
        output = _outputs().ViTMAEForPreTrainingOutput(loss=loss, logits=logits, mask=mask, ids_restore=ids_restore, **extras)
        return self._answer(output, return_dict)

    def patchify(self, pixel_values: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, L, P), channel-fastest patch order."""
        return self.mae.patchify(pixel_values)

    def unpatchify(self, patchified_pixel_values: Tensor) -> Tensor:
        """The inverse of patchify."""
        return self.mae.unpatchify(patchified_pixel_values)


def _outputs() -> Any:
    from transformers.models.vit_mae import modeling_vit_mae

    return modeling_vit_mae


def _mae_of(config: Any, **decoder: Any) -> MAE:
    """Return the MAE of a configuration. Raises ValueError for settings that MAE lacks."""
    require_transformers()
    for name, wanted in (("hidden_act", "gelu"), ("qkv_bias", True)):
        if (value := getattr(config, name, wanted)) != wanted:
            raise ValueError(f"config.{name} must be {wanted!r} for maefast; it is {value!r}")
    ratio = config.intermediate_size / config.hidden_size
    if decoder["decoder_depth"] and config.decoder_intermediate_size != int(config.decoder_hidden_size * ratio):
        raise ValueError(
            f"config must have MLPs of one ratio in encoder and decoder for maefast; they are {config.intermediate_size} / "
            f"{config.hidden_size} and {config.decoder_intermediate_size} / {config.decoder_hidden_size}"
        )
    mae = MAE(
        img_size=_size(config.image_size),
        patch_size=_size(config.patch_size),
        in_chans=config.num_channels,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=ratio,
        norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
        norm_pix_loss=config.norm_pix_loss,
        **decoder,
    )
    rates = getattr(config, "hidden_dropout_prob", 0.0), getattr(config, "attention_probs_dropout_prob", 0.0)
    for blocks in (mae.blocks, mae.decoder_blocks):
        add_dropout(blocks, *rates)
    return mae


def _size(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width
