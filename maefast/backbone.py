"""Backbone: what MAE and the VisionTransformer share, from images to tokens with positions."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _torch, request
from .patch_embed import PatchEmbed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A model with a patch embedding, a class token, positions and pixel statistics."""

    patch_embed: PatchEmbed
    cls_token: nn.Parameter  # (1, 1, D)
    pos_embed: nn.Parameter  # (1, 1+L, D), the class token's first
    mean: Tensor | None  # (C,) fp32
    std: Tensor | None
    statistics_given: bool  # or else ImageNet's by default

    def _set_pixel_statistics(self, in_chans: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Set mean and std per channel, which the official state_dict has no place for."""
        if (mean is None) != (std is None):
            raise ValueError("mean and std must be given together")
        self.statistics_given = mean is not None
        if mean is None or std is None:
            mean, std = (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else (None, None)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != in_chans:
                raise ValueError(f"{name} must have one value for each of the {in_chans} channels; it has {len(values)}")
        if std is not None and not all(value > 0 for value in std):
            raise ValueError(f"std must be positive; it is {tuple(std)}")
        self._held = dict[str, Tensor]()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, None, persistent=False)
            if values is not None:
                value = torch.tensor(values, dtype=torch.float32, device="cpu")
                self._place_statistic(name, value, torch.get_default_device())
        self.register_load_state_dict_post_hook(follow_parameters)

    def _place_statistic(self, name: str, value: Tensor, device: torch.device) -> None:
        """Place a statistic on `device`; on meta, its values are held beside it, since no
        state_dict has them."""
        if value.is_meta:
            value = self._held[name]
        if device.type == "meta":
            self._held[name] = value
        setattr(self, name, value.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        # Pixel statistics keep their values: to_empty would lose them, and rounded to bf16 they
        # would shift every uint8 image.
        statistics = {name: value for name in ("mean", "std") if (value := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, value in statistics.items():
            self._place_statistic(name, value, getattr(self, name).device)
        return self

    def _check_images(self, imgs: Tensor, any_size: bool = False) -> None:
        if torch.jit.is_tracing() or _torch.is_exporting():
            _check_graph(type(self).__name__)
        self.patch_embed.check(imgs, any_size)
        if not imgs.dtype.is_floating_point and imgs.dtype != torch.uint8:
            raise TypeError(f"imgs must be floating-point or uint8; it is {str(imgs.dtype).removeprefix('torch.')}")
        self._statistics_for(imgs)

    def _statistics_for(self, imgs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if imgs.dtype != torch.uint8:
            return None, None
        if self.mean is None:
            images = f"uint8 images of {imgs.shape[1]} channels"
            raise ValueError(f"mean and std must be given to {type(self).__name__} for {images}")
        return self.mean, self.std

    def _embed(self, imgs: Tensor, **options: bool) -> Tensor:
        return self.patch_embed(imgs, None, *self._statistics_for(imgs), **options)

    def _with_class_token(self, x: Tensor) -> Tensor:
        """Prepend the class token to patch tokens x (N, K, D), which have their positions."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls_token, x], dim=1)


def _check_graph(model: str) -> None:
    """Raise RuntimeError where torch writes a graph that has no place for maefast's own ops."""
    onnx = _torch.in_onnx_export()
    if (onnx or torch.jit.is_tracing()) and request.requested() != "eager":
        graph, call = ("an ONNX graph", "torch.onnx.export") if onnx else ("a traced graph", "torch.jit.trace")
        raise RuntimeError(
            f'{graph} has no place for the native ops of {model}: call {call} within maefast.backend("eager"), '
            "or use torch.export, which takes them"
        )


def follow_parameters(model: Backbone, *_: Any) -> None:
    """Move pixel statistics to where load_state_dict(assign=True) put the parameters."""
    for name in ("mean", "std"):
        value, device = getattr(model, name), model.pos_embed.device
        if value is not None and value.device != device:
            model._place_statistic(name, value, device)
