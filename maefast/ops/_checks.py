"""Checks that several ops share."""

from collections.abc import Sequence

import torch
from torch import Tensor


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def needs_gradient(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def why_no_gradient(op: str, name: str) -> str:
    """Return why no kernel of `op` runs when the argument `name` needs a gradient."""
    return f"the kernels of {op} have no gradient for {name}"


def check_no_grad(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and needs_gradient(tensor):
            raise ValueError(f"{name} has no gradient in this op, but requires one: pass {name}.detach()")


def check_same_device(**tensors: Tensor | None) -> None:
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    (first, reference), *rest = given
    for name, tensor in rest:
        if tensor.device != reference.device:
            raise ValueError(f"{name} must be on the device of {first}, {reference.device}; it is on {tensor.device}")


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}; it is {str(tensor.dtype).removeprefix('torch.')}")


def check_floating(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating-point; it is {str(tensor.dtype).removeprefix('torch.')}")


def check_patch_size(patch_size: int | tuple[int, int]) -> tuple[int, int]:
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if ph < 1 or pw < 1:
        raise ValueError(f"patch_size must be positive; it is {patch_size}")
    return ph, pw


def check_images(imgs: Tensor, patch_size: tuple[int, int], mean: Tensor | None, std: Tensor | None) -> None:
    """Check imgs (N, C, H, W), floating-point or uint8, mean and std (C,), fp32, both or none."""
    if imgs.dim() != 4:
        raise ValueError(f"imgs must be (N, C, H, W); its shape is {shape_of(imgs)}")
    if not imgs.dtype.is_floating_point and imgs.dtype != torch.uint8:
        raise TypeError(f"imgs must be floating-point or uint8; it is {str(imgs.dtype).removeprefix('torch.')}")
    (ph, pw), (H, W) = patch_size, imgs.shape[2:]
    if H % ph or W % pw:
        raise ValueError(f"imgs must have a height and width that are multiples of the patch, {ph} x {pw}; they are {H} x {W}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together")
    if mean is None or std is None:
        return
    if imgs.dtype != torch.uint8:
        raise ValueError(f"mean and std normalise uint8 images; imgs is {str(imgs.dtype).removeprefix('torch.')}")
    for name, statistic in (("mean", mean), ("std", std)):
        check_dtype(name, statistic, (torch.float32,))
        if statistic.shape != (imgs.shape[1],):
            raise ValueError(f"{name} must be (C,) = ({imgs.shape[1]},); its shape is {shape_of(statistic)}")
    check_no_grad(mean=mean, std=std)
    check_same_device(imgs=imgs, mean=mean, std=std)


def to_float_pixels(imgs: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Return floating-point images unchanged, and uint8 ones as fp32 (x/255 - mean)/std."""
    if imgs.dtype != torch.uint8:
        return imgs
    pixels = imgs.float() / 255
    return pixels if mean is None or std is None else (pixels - mean[:, None, None]) / std[:, None, None]


def values_are_known(tensor: Tensor) -> bool:
    """Return whether a check may read values: on the CPU, and not while a graph is being traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) in (Tensor, torch.nn.Parameter)


def check_rows(x: Tensor, **parameters: Tensor | None) -> None:
    """Check x (..., D) with D >= 1 and parameters (D,), all floating-point and on one device."""
    given = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    check_floating(x=x, **given)
    check_same_device(x=x, **given)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., D) with D >= 1; its shape is {shape_of(x)}")
    D = x.shape[-1]
    for name, parameter in given.items():
        if parameter.shape != (D,):
            raise ValueError(f"{name} must be (D,) = ({D},); its shape is {shape_of(parameter)}")


def check_out_dtype(dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """Return `dtype`, which must be floating-point, or the default if it is None."""
    if dtype is None:
        return default
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating-point; it is {str(dtype).removeprefix('torch.')}")
    return dtype
