"""The baseline that runs are compared with: the plain eager reference on a model's parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.architecture import of_model
from ..model import MAE
from ..reference import MAEOutput, ReferenceMAE


def reference_on(model: MAE) -> Callable[..., MAEOutput]:
    """Return ReferenceMAE's forward on the parameters of `model`, with the arguments of `model`.

    uint8 images are first normalised in float, as scripts around the official model do.
    `return_pred` has no effect.
    """
    config = of_model(model).arguments()
    reference = ReferenceMAE(**{name: value for name, value in config.items() if name not in ("mean", "std")})
    config |= {"mean": model.mean, "std": model.std}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(module), leaf, parameter)

    def forward(
        imgs: Tensor, mask_ratio: float, *, noise: Tensor, return_pred: bool = True, weights: Tensor | None = None
    ) -> MAEOutput:
        imgs = normalised(imgs, config) if imgs.dtype == torch.uint8 else imgs
        output = reference(imgs, mask_ratio, noise=noise)
        if weights is None or output.pred is None:
            return output
        return output._replace(loss=reference.forward_loss(imgs, output.pred, output.mask * weights))

    return forward


def normalised(images: Tensor, config: dict[str, Any]) -> Tensor:
    """Return uint8 images (N, C, H, W) as fp32 `(x/255 - mean)/std`, both from `config`."""
    mean, std = (torch.as_tensor(config[name], device=images.device).reshape(-1, 1, 1) for name in ("mean", "std"))
    return (images / 255.0 - mean) / std
