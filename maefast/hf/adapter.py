"""What ViTMAEModel and ViTMAEForPreTraining share: the methods of transformers' PreTrainedModel."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _torch, ops
from ..blocks import Attention
from ..checkpoint import load
from ..init import init_weights
from .capture import DroppingAttention, captured
from .loading import Source, neutral, read_config, wanted_device, wanted_dtype, write
from .names import their_names, to_own_names, to_transformers_names

ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash_attn"}  # their names
A = TypeVar("A", bound="Adapter")


class Adapter(nn.Module):
    """The methods of transformers' PreTrainedModel that ViTMAEModel and ViTMAEForPreTraining have.

    _inner    the submodule that holds the parameters, by official names
    _outer    the prefix of transformers' names that the class lacks, being the base model
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
        self.register_state_dict_post_hook(to_transformers_names)
        self.register_load_state_dict_pre_hook(to_own_names)

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
        """Return the number of values; exclude_embeddings: without the patch embedding's."""
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

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Run attention on "eager", "sdpa" or "flash_attention_2"."""
        if attn_implementation not in ATTENTION:
            wanted = f"it must be one of {', '.join(ATTENTION)}"
            raise ValueError(f'Specified `attn_implementation="{attn_implementation}"` is not supported; {wanted}')
        module: Any
        for module in self.modules():
            if isinstance(module, Attention | DroppingAttention):
                module.backend = ATTENTION[attn_implementation]
        self.config._attn_implementation = attn_implementation

    def enable_input_require_grads(self) -> None:
        """Let embedded patches require gradients, for adapters under activation checkpointing."""
        self.disable_input_require_grads()
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_(True))

    def disable_input_require_grads(self) -> None:
        if self._require_grads_hook is not None:
            self._require_grads_hook.remove()
        self._require_grads_hook = None

    # -- activation checkpointing

    @property
    def _stacks(self) -> list[nn.ModuleList]:
        return [stack for name in ("blocks", "decoder_blocks") if (stack := getattr(self._weights, name, None)) is not None]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recompute the activations of blocks in their backward pass.

        activation_checkpointing_kwargs    of torch.utils.checkpoint.checkpoint; use_reentrant is
                                           False by default
        every_n_layers                     every n-th block of the encoder, and of the decoder
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
        named = {"missing_keys": their_names(missing, model._outer), "unexpected_keys": their_names(unexpected, model._outer)}
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

    # -- forward

    def _flag(self, given: bool | None, name: str, default: bool = False) -> bool:
        """Return an argument of forward, by default the configuration's."""
        return bool(getattr(self.config, name, default) if given is None else given)

    @contextmanager
    def _capturing(self, attentions: bool | None, hidden: bool | None) -> Iterator[dict[str, Any]]:
        """Yield hidden states and attentions, complete when the block ends."""
        extras: dict[str, Any] = {"hidden_states": None, "attentions": None}
        wanted = self._flag(hidden, "output_hidden_states"), self._flag(attentions, "output_attentions")
        with captured(self._weights.blocks, *wanted) as kept:
            yield extras
        for name, asked, tensors in zip(extras, wanted, kept, strict=True):
            extras[name] = tuple(tensors) if asked else None

    def _answer(self, output: Any, return_dict: bool | None) -> Any:
        return output if self._flag(return_dict, "return_dict", default=True) else output.to_tuple()

    def _noise_for(
        self, pixel_values: Tensor | None, noise: Tensor | None, interpolate: bool | None, attention_mask: Tensor | None
    ) -> Tensor:
        """Return fp32 noise (N, L) that ranks as `noise`, or a draw; refuse unknown arguments."""
        if pixel_values is None:
            raise ValueError("pixel_values must be given; it is None")
        if interpolate:
            raise ValueError("interpolate_pos_encoding must be False: give from_pretrained a config of that image_size instead")
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: every token attends to every other")
        if noise is None:
            return ops.masking_noise(pixel_values.shape[0], self._weights.patch_embed.num_patches, pixel_values.device)
        if noise.dtype == torch.float32 or not noise.dtype.is_floating_point:
            return noise
        # ranks, which rounding cannot tie
        return noise.argsort(dim=1, stable=True).argsort(dim=1).float()
