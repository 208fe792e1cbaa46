"""The mean and std of uint8 images, in the configurations of other libraries."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Statistics = tuple[list[float], list[float]]

IMAGENET: Statistics = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
BYTE = 255.0


def of_timm(config: Mapping[str, Any]) -> Statistics | None:
    """Return mean and std of pixels in 0..1 from timm's pretrained_cfg, or None."""
    mean, std = config.get("mean"), config.get("std")
    return None if mean is None or std is None else (list(mean), list(std))


def of_preprocessor(config: Mapping[str, Any], channels: int) -> Statistics | None:
    """Return mean and std of pixels in 0..1 from transformers' preprocessor_config.json, or None.
    Its rescale_factor is taken into account.

    A value that is equal for all its channels is used for any number of channels.
    """
    if not config.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    elif "image_mean" in config and "image_std" in config:
        mean, std = (_listed(config[name]) for name in ("image_mean", "image_std"))
    else:
        return None
    scale = BYTE * float(config.get("rescale_factor", 1 / BYTE)) if config.get("do_rescale", True) else BYTE
    mean, std = ([value / scale for value in values] for values in (mean, std))
    if len(mean) != channels and len(set(mean)) == len(set(std)) == 1:
        mean, std = mean[:1] * channels, std[:1] * channels
    return mean, std


def _listed(values: Any) -> list[float]:
    return [float(value) for value in (values if isinstance(values, list | tuple) else [values])]


def preprocessor(mean: Sequence[float], std: Sequence[float], size: tuple[int, int]) -> dict[str, Any]:
    """Return transformers' preprocessor_config.json for mean and std of pixels in 0..1."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / BYTE,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def are_of_pixels(mean: Sequence[float], std: Sequence[float]) -> bool:
    """Return whether mean and std can belong to pixels in 0..1, not to floats in another unit."""
    return all(0 <= value <= 1 for value in (*mean, *std))


def differ(told: Statistics, others: Statistics) -> bool:
    pairs = [(a, b) for ours, theirs in zip(told, others, strict=True) for a, b in zip(ours, theirs, strict=False)]
    return len(told[0]) != len(others[0]) or any(abs(a - b) > 1e-5 * max(1.0, abs(a)) for a, b in pairs)


def warn_of_model(model: nn.Module, told: Statistics | None) -> list[str]:
    """Return a warning if the mean and std of a model differ from the checkpoint's."""
    mean, std = (getattr(model, name, None) for name in ("mean", "std"))
    if told is None or not isinstance(mean, Tensor) or not isinstance(std, Tensor) or mean.is_meta or std.is_meta:
        return []
    own = mean.tolist(), std.tolist()
    if not differ(told, own):
        return []
    return [f"mean and std are {told[0]} and {told[1]} in the checkpoint, and {_short(own[0])} and {_short(own[1])} in the model"]


def _short(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]


def warn_of_layout(to: str, told: Statistics | None) -> list[str]:
    """Return a warning if mean and std are not ImageNet's and the layout `to` does not store them
    in the model."""
    if told is None or not differ(told, IMAGENET):
        return []
    values = f"mean and std of the images, {told[0]} and {told[1]}"
    if to == "transformers" and are_of_pixels(*told):
        return [f"{values}, are in preprocessor_config.json; ViTMAE itself takes images that are normalised"]
    return [f"the layout has no place for {values}; give them where it is read"]
