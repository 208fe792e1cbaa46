"""ViTMAEForPreTraining, ViTMAEModel and their base class."""

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _torch, ops
from ..backbone import follow_parameters
from ..blocks import Attention
from ..checkpoint import load
from ..checkpoint.candidates import official_names
from ..checkpoint.layouts import transformers_names
from ..init import init_weights
from ..model import MAE
from .capture import DroppingAttention, add_dropout, captured
from .loading import Source, neutral, read_config, require_transformers, wanted_device, wanted_dtype, write

# transformers' names of backends
ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash_attn"}
A = TypeVar("A", bound="Adapter")


class Adapter(nn.Module):
    """The methods of transformers' PreTrainedModel that ViTMAEModel and ViTMAEForPreTraining have.

    _inner    the name of the submodule with official names that holds the parameters
    _outer    begins transformers' names that the class has not, its base model being the whole
    """

    main_input_name = "pixel_values"
    base_model_prefix = "vit"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True
    _supports_flex_attn = False
    _keep_in_fp32_modules = _keep_in_fp32_modules_strict = ()
    _keys_to_ignore_on_load_missing = _keys_to_ignore_on_load_unexpected = _keys_to_ignore_on_save = None
    _inner: str
    _outer: str

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self._require_grads_hook: Any = None
        self.register_state_dict_post_hook(_to_transformers_names)
        self.register_load_state_dict_pre_hook(_to_own_names)

    def _finish(self) -> None:
        if getattr(self.config, "gradient_checkpointing", False):
            self.activation_checkpointing_enable()

    @property
    def _weights(self) -> Any:
        return getattr(self, self._inner)

    @property
    def _mae(self) -> Any:
        return getattr(self._weights, "mae", self._weights)

    @property
    def device(self) -> torch.device:
        return self._weights.cls_token.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.cls_token.dtype

    @property
    def base_model(self) -> Any:
        """The encoder."""
        return getattr(self, self.base_model_prefix, self)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return how many values the parameters have. exclude_embeddings: without the patch
        embedding."""
        left_out = {id(p) for p in self.get_input_embeddings().parameters()} if exclude_embeddings else set()
        counted = (p for p in self.parameters() if id(p) not in left_out and (p.requires_grad or not only_trainable))
        return sum(p.numel() for p in counted)

    def get_input_embeddings(self) -> nn.Module:
        return self._weights.patch_embed

    def get_output_embeddings(self) -> None:
        return None

    def tie_weights(self) -> None:
        """No weights are tied."""

    def init_weights(self) -> None:
        """Initialise all weights again, as the official model does."""
        init_weights(self._mae)

    @classmethod
    def can_generate(cls) -> bool:
        return False

    @classmethod
    def _from_config(cls: type[A], config: Any, *, dtype: Any = None, attn_implementation: str | None = None) -> A:
        """Return a fresh model, as transformers' AutoModel makes it."""
        model = cls(copy.deepcopy(config))
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model.to(dtype=wanted_dtype(dtype, config))

    # -- attention
    # ---------------------------------------------------------------------------------------

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Run attention on "eager", "sdpa" or "flash_attention_2" in place of what maefast chooses."""
        if attn_implementation not in ATTENTION:
            wanted = f"it must be one of {', '.join(ATTENTION)}"
            raise ValueError(f'Specified `attn_implementation="{attn_implementation}"` is not supported; {wanted}')
        module: Any
        for module in self.modules():
            if isinstance(module, Attention | DroppingAttention):
                module.backend = ATTENTION[attn_implementation]
        self.config._attn_implementation = attn_implementation

    def enable_input_require_grads(self) -> None:
        """Let the embedded patches require gradients, which adapters on a frozen model need under
        activation checkpointing."""
        self.disable_input_require_grads()
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))

    def disable_input_require_grads(self) -> None:
        if self._require_grads_hook is not None:
            self._require_grads_hook.remove()
        self._require_grads_hook = None

    # -- activation checkpointing
    # ------------------------------------------------------------------------

    @property
    def _stacks(self) -> list[nn.ModuleList]:
        return [stack for name in ("blocks", "decoder_blocks") if (stack := getattr(self._weights, name, None)) is not None]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Compute the activations of blocks again in their backward pass.

        activation_checkpointing_kwargs    of torch.utils.checkpoint.checkpoint; use_reentrant is
                                           False by default
        every_n_layers                     which blocks: every n-th of the encoder, and of the
                                           decoder
        Raises ValueError for offload=True, and for an every_n_layers below 1.
        """
        if offload:
            raise ValueError("offload must be False for maefast: what checkpoints keep stays on the device")
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers must be at least 1; it is {every_n_layers}")
        self.activation_checkpointing_disable()
        options = dict(activation_checkpointing_kwargs or {})
        use_reentrant = options.pop("use_reentrant", False)
        for stack in self._stacks:
            for i in range(0, len(stack), every_n_layers):
                stack[i] = _torch.checkpointed(stack[i], use_reentrant, **options)

    def activation_checkpointing_disable(self) -> None:
        for stack in self._stacks:
            for i, block in enumerate(stack):
                stack[i] = _torch.without_checkpointing(block)

    @property
    def is_activation_checkpointing(self) -> bool:
        return any(_torch.without_checkpointing(block) is not block for stack in self._stacks for block in stack)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """The older name of activation_checkpointing_enable."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing

    # -- checkpoints
    # -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[A],
        pretrained_model_name_or_path: str | Path | None,
        *,
        config: Any = None,
        state_dict: Mapping[str, Tensor] | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        subfolder: str = "",
        use_safetensors: bool | None = None,
        dtype: torch.dtype | str | None = "auto",
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        key: str | None = None,
        output_loading_info: bool = False,
        **overrides: Any,
    ) -> Any:
        """Return a model in eval mode with the weights of a checkpoint, of any layout that
        `maefast.checkpoint` reads.

        pretrained_model_name_or_path    a folder, a file, or a model of the hub, which is looked
                                         for in the local cache first; with HF_HUB_OFFLINE=1 or
                                         local_files_only there alone
        state_dict                       by transformers' names, in place of a checkpoint, which is
                                         then None; needs config
        config                           a ViTMAEConfig, or where one is read from; by default that
                                         beside the weights
        dtype                            of the model; "auto": as the configuration tells, else
                                         fp32. torch_dtype is its old name
        device_map                       None or one device
        attn_implementation              "eager", "sdpa" or "flash_attention_2"; by default maefast
                                         chooses
        key                              which weights to take where the checkpoint holds several
        output_loading_info              True: (model, dict of missing_keys and unexpected_keys, by
                                         transformers' names)
        overrides                        entries of the configuration, such as mask_ratio
        Warns as `MAE.from_pretrained`. Raises as `maefast.checkpoint.load`, OSError for a model
        that is not found, TypeError or ValueError for arguments that the model cannot honour,
        RuntimeError where transformers is missing.
        """
        options = {
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
            "revision": revision,
            "subfolder": subfolder,
        }
        if (pretrained_model_name_or_path is None) == (state_dict is None):
            raise ValueError("pretrained_model_name_or_path or state_dict must be given, and not both")
        source, overrides = Source(pretrained_model_name_or_path or "", options), neutral(overrides)
        device = wanted_device(device_map)
        config = read_config(source, config, overrides)
        to = wanted_dtype(dtype if torch_dtype is None else torch_dtype, config)
        model = cls(config)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        if state_dict is not None:
            model.load_state_dict(state_dict)
            missing, unexpected = tuple[str, ...](), tuple[str, ...]()
        else:
            report = load(model._weights, source.weights(use_safetensors), key=key)
            missing, unexpected = report.missing, report.unexpected
            for warning in report.warnings:
                warnings.warn(f"{pretrained_model_name_or_path}: {warning}", stacklevel=2)
        model = model.to(device=device, dtype=to).eval()
        if not output_loading_info:
            return model
        named = {"missing_keys": model._their_names(missing), "unexpected_keys": model._their_names(unexpected)}
        return model, named | {"mismatched_keys": set(), "error_msgs": []}

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config.json and model.safetensors to a folder, made where there is none;
        transformers' class reads them.

        is_main_process       False: write nothing
        state_dict            written in place of the model's own
        max_shard_size        of one file; larger weights are split, with an index
        safe_serialization    False: pytorch_model.bin in place of model.safetensors
        Raises ValueError for push_to_hub, and where save_directory is a file.
        """
        if push_to_hub:
            self.push_to_hub()
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory must be a folder; {folder} is a file")
        if not is_main_process:
            return
        config = copy.deepcopy(self.config)
        config.architectures, config.dtype = [type(self).__name__], str(self.dtype).removeprefix("torch.")
        write(folder, config, self.state_dict() if state_dict is None else state_dict, max_shard_size, safe_serialization)

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Raises ValueError: maefast uploads nothing."""
        raise ValueError("push_to_hub is not offered: upload the folder of save_pretrained with huggingface_hub.upload_folder")

    def _their_names(self, names: tuple[str, ...]) -> set[str]:
        """Return official names by transformers' names, for those that it has."""
        placed = {name: torch.empty(3, 1) for name in names}
        known: set[str] = set()
        for name, tensor in placed.items():
            try:
                known |= transformers_names({name: tensor}).keys()
            except KeyError:
                known.add(name)
        return {name.removeprefix(self._outer) for name in known}

    # -- forward
    # -----------------------------------------------------------------------------------------

    def _flag(self, given: bool | None, name: str, default: bool = False) -> bool:
        """Return an argument of forward, by default the configuration's."""
        return bool(getattr(self.config, name, default) if given is None else given)

    def _noise_for(self, pixel_values: Tensor | None, noise: Tensor | None, refused: Mapping[str, Any]) -> Tensor:
        """Return noise (N, L) in fp32 that ranks as `noise`, or a fresh draw. Raises for arguments
        that are refused."""
        if pixel_values is None:
            raise ValueError("pixel_values must be given; it is None")
        if refused["interpolate_pos_encoding"]:
            raise ValueError("interpolate_pos_encoding must be False: give from_pretrained a config of that image_size instead")
        if refused["attention_mask"] is not None:
            raise ValueError("attention_mask must be None: every token attends to every other")
        if noise is None:
            return ops.masking_noise(pixel_values.shape[0], self._weights.patch_embed.num_patches, pixel_values.device)
        if noise.dtype == torch.float32 or not noise.dtype.is_floating_point:
            return noise
        # ranks, which rounding cannot tie
        return noise.argsort(dim=1, stable=True).argsort(dim=1).float()


class _Encoder(nn.Module):
    """The encoder of an MAE under official names, without its decoder."""

    def __init__(self, mae: MAE):
        super().__init__()
        # not a submodule: its decoder is none of the encoder's
        object.__setattr__(self, "mae", mae)
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
    """transformers' class of this name, the encoder on masked images, around the encoder of a
    `maefast.MAE`.

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
        """pixel_values (N, C, H, W), noise (N, L) -> ViTMAEModelOutput: last_hidden_state (N, 1+K,
        D), mask, ids_restore (N, L).

        Arguments and errors are those of ViTMAEForPreTraining.forward.
        """
        refused = {"interpolate_pos_encoding": interpolate_pos_encoding, "attention_mask": attention_mask}
        noise = self._noise_for(pixel_values, noise, refused)
        mae = self._mae
        mae._check_images(pixel_values)
        wanted = self._flag(output_hidden_states, "output_hidden_states"), self._flag(output_attentions, "output_attentions")
        len_keep = ops.len_keep(noise.shape[1], self.config.mask_ratio)
        with captured(self.layers, *wanted) as (states, weights):
            x, mask, ids_restore = mae._embed_kept(pixel_values, noise, len_keep)
            latent = mae._encode_tokens(x)
        output = _outputs().ViTMAEModelOutput(
            last_hidden_state=latent,
            mask=mask,
            ids_restore=ids_restore,
            hidden_states=tuple(states) if wanted[0] else None,
            attentions=tuple(weights) if wanted[1] else None,
        )
        return output if self._flag(return_dict, "return_dict", default=True) else output.to_tuple()


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
        """pixel_values (N, C, H, W) -> ViTMAEForPreTrainingOutput: loss, logits (N, L, P), mask (N,
        L), ids_restore (N, L).

        noise (N, L)                               decides the mask in place of a fresh draw;
                                                   config.mask_ratio of the patches are removed
        output_attentions, output_hidden_states    of the encoder; by default as config says. Blocks
                                                   then run module by module
        return_dict                                False: a tuple
        Raises ValueError for interpolate_pos_encoding: a model for another size is made with that
        `image_size` in its configuration, and from_pretrained fits the positions. `model.mae` takes
        more, such as return_pred=False.
        """
        refused = {"interpolate_pos_encoding": interpolate_pos_encoding, "attention_mask": attention_mask}
        noise = self._noise_for(pixel_values, noise, refused)
        wanted = self._flag(output_hidden_states, "output_hidden_states"), self._flag(output_attentions, "output_attentions")
        self.mae.norm_pix_loss = bool(self.config.norm_pix_loss)
        with captured(self.mae.blocks, *wanted) as (states, weights):
            loss, logits, mask = self.mae(pixel_values, self.config.mask_ratio, noise=noise)
        len_keep = ops.len_keep(noise.shape[1], self.config.mask_ratio)
        output = _outputs().ViTMAEForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=mask,
            ids_restore=ops.random_masking(noise, len_keep)[1],
            hidden_states=tuple(states) if wanted[0] else None,
            attentions=tuple(weights) if wanted[1] else None,
        )
        return output if self._flag(return_dict, "return_dict", default=True) else output.to_tuple()

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


def _to_transformers_names(module: Any, state_dict: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    inner = f"{prefix}{module._inner}."
    own = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(inner)}
    named = transformers_names({name.removeprefix(inner): tensor for name, tensor in own.items()})
    state_dict.update({prefix + name.removeprefix(module._outer): tensor for name, tensor in named.items()})


def _to_own_names(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    begins = ("embeddings.", "encoder.", "layers.", "layernorm.") if module._outer else ("vit.", "decoder.")
    theirs = {
        name: state_dict.pop(name) for name in list(state_dict) if name.startswith(tuple(prefix + begin for begin in begins))
    }
    if theirs:
        named = official_names({name.removeprefix(prefix): t for name, t in theirs.items()}, Path("the state_dict"))
        state_dict.update({f"{prefix}{module._inner}.{name}": tensor for name, tensor in named.items()})
