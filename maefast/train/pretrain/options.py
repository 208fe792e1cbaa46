"""The options of `maefast pretrain`, for flags, configuration files and Python."""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ... import models_mae
from ..data.pretraining import AUGMENTATIONS
from ..errors import UserError, user_errors
from ..masks import SAMPLERS
from ..values import ANY, RATIO, SEED, Parse, nearest, number, numbers, one_of, sides, whole
from ..variants import TARGETS

MODELS = tuple(sorted(name for name in models_mae.__all__ if name.startswith("mae_vit_")))


def option(default: Any, parse: Parse | None, help: str, metavar: str | None = None) -> Any:
    """Declare a field of Options. Without `parse` it is a switch, --name and --no_name."""
    return field(default=default, metadata={"parse": parse, "help": help, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a pre-training, with the official launcher's names. None: the run chooses."""

    data_path: Path = option(Path("data"), Path, "the images, or a folder with them in train/", "PATH")
    output_dir: Path = option(Path("output_dir"), Path, "folder of checkpoints, log.txt and pictures", "DIR")
    log_dir: Path | None = option(None, Path, "folder of TensorBoard events, if TensorBoard is installed (output_dir)", "DIR")
    resume: str = option("", str, "auto: resume from the newest checkpoint of output_dir, if any; or a checkpoint", "auto|FILE")
    init: Path | None = option(None, Path, "initial weights: a checkpoint of any layout that maefast convert reads", "FILE")
    key: str | None = option(None, str, "which model of --init to take, if it holds several")
    start_epoch: int = option(0, whole(0), "number of the first epoch of a new run")
    model: str = option("mae_vit_large_patch16", one_of(MODELS), "a model factory of maefast", "NAME")
    input_size: int | tuple[int, int] = option(224, sides, "side of the images, or height and width", "S | H W")
    patch_size: int | tuple[int, int] | None = option(None, sides, "side of a patch, or both sides (the model's)", "S | H W")
    embed_dim: int | None = option(None, whole(1), "width of the encoder (the model's)")
    depth: int | None = option(None, whole(1), "blocks of the encoder (the model's)")
    num_heads: int | None = option(None, whole(1), "heads of the encoder (the model's)")
    decoder_embed_dim: int | None = option(None, whole(1), "width of the decoder (the model's)")
    decoder_depth: int | None = option(None, whole(1), "blocks of the decoder (the model's)")
    decoder_num_heads: int | None = option(None, whole(1), "heads of the decoder (the model's)")
    in_chans: int | None = option(None, whole(1), "number of channels that the images are converted to (3; an array's own)")
    mean: tuple[float, ...] | None = option(
        None, numbers(ANY), "mean per channel, of uint8 in 0..1 (3: ImageNet's, else 0.5), of floats in their unit", "M,.."
    )
    std: tuple[float, ...] | None = option(
        None, numbers(0, above=True), "standard deviation per channel, in --mean's unit", "S,.."
    )
    nodata: float | None = option(None, number(ANY), "value of a float array that means missing, as NaN does", "V")
    mask_ratio: float = option(0.75, RATIO, "fraction of the patches that is removed")
    sampler: str = option("random", one_of(SAMPLERS), "patches to remove: random ones, blocks, or all but one of each 2 x 2")
    target: str = option(None, one_of(TARGETS), "pixels, pixels normalised per patch, or principal components of patches (pixel)")
    norm_pix_loss: bool = option(False, None, "the same as --target norm")
    mask_tokens_in_encoder: bool = option(False, None, "run the encoder on all tokens, mask tokens included")
    augment: str = option("rrc", one_of(AUGMENTATIONS), "none: centre; crop: fixed size; rrc: random size; jitter: colours")
    flip: bool | None = option(None, None, "mirror half of the images (yes, unless --augment none)")
    batch_size: int = option(64, whole(1), "images per forward pass and process")
    accum_iter: int = option(1, whole(1), "forward passes per optimizer step")
    epochs: int = option(400, whole(1), "passes over the images")
    warmup_epochs: int = option(40, whole(0), "epochs of linear warm-up")
    blr: float = option(1e-3, number(0), "base learning rate: lr = blr x batch_size x accum_iter x processes / 256")
    lr: float | None = option(None, number(0), "learning rate, overrides --blr")
    min_lr: float = option(0.0, number(0), "learning rate at the end of the cosine")
    weight_decay: float = option(0.05, number(0), "weight decay of all parameters but biases and one-dimensional ones")
    clip_grad: float | None = option(None, number(0, above=True), "greatest norm of the gradient")
    amp: str | None = option(None, one_of(("bf16", "fp16", "off")), "autocast (bf16 on a GPU, off on a CPU)", "bf16|fp16|off")
    reference: bool = option(False, None, "train the plain eager model instead, for comparison: the same losses, slower")
    device: str | None = option(None, str, "cuda or cpu (cuda if there is a GPU)")
    seed: int = option(0, SEED, "seed of weights, order, crops and masks")
    num_workers: int = option(min(10, os.cpu_count() or 1), whole(0), "processes that load images; results do not depend on it")
    pin_mem: bool = option(True, None, "page-locked batches for a GPU")
    rewind: int = option(0, whole(0), "how often a run may return to the last checkpoint after a loss that is not finite")
    save_steps: int = option(0, whole(0), "also save after this many steps within an epoch; 0: only after epochs")
    keep: int = option(3, whole(1), "number of newest checkpoints to keep")
    compile: bool = option(False, None, "run the model under torch.compile")
    graph: bool = option(False, None, "run steps as a CUDA graph, for small batches on one GPU")
    fsdp: bool = option(False, None, "shard weights and optimizer state over the processes")
    world_size: int | None = option(None, whole(1), "expected number of processes, to be checked")
    local_rank: int | None = option(None, whole(0), "rank of this process on its machine, if the launcher sets no LOCAL_RANK")
    dist_on_itp: bool = option(False, None, "read rank and world size from Open MPI's variables")
    dist_url: str = option("env://", str, "rendezvous address: env://, tcp://HOST:PORT or file:///PATH", "URL")
    pictures: int = option(8, whole(0), "number of images to reconstruct and draw after each epoch")

    def __post_init__(self) -> None:
        """Parse every value as its flag. Raises UserError for a value that the flag refuses."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None or entry.default is not None:
                object.__setattr__(self, entry.name, _parsed(entry.name, value, entry.metadata["parse"]))
        target = self.target or ("norm" if self.norm_pix_loss else "pixel")
        if self.norm_pix_loss and target != "norm":
            raise UserError(f"--target must be norm with --norm_pix_loss; it is {target}")
        if self.reference and (self.mask_tokens_in_encoder or target == "pca"):
            what = "--mask_tokens_in_encoder and --target pca, which the plain model lacks"
            raise UserError(f"--reference must be given without {what}")
        if self.graph:
            self._check_graph()
        if self.key is not None and self.init is None:
            raise UserError(f"--key must be given together with --init, whose weights it chooses; it is {self.key}")
        object.__setattr__(self, "target", target)
        object.__setattr__(self, "norm_pix_loss", target == "norm")

    def _check_graph(self) -> None:
        if self.reference:
            raise UserError("--graph must be given without --reference, which is the plain eager model")
        if self.fsdp:
            raise UserError("--graph must be given without --fsdp, which runs in several processes")
        if self.accum_iter > 1:
            what = "--accum_iter 1, since a graph holds one forward pass"
            raise UserError(f"--graph must be given with {what}; it is {self.accum_iter}")
        if self.amp == "fp16":
            raise UserError("--graph must be given without --amp fp16, which needs a gradient scaler; bf16 needs none")


def from_arguments(given: Mapping[str, Any]) -> Options:
    """Build Options from flags and from the YAML file of the flag `config`. Raises UserError."""
    return Options(**with_config(given))


def with_config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags and, where they are not given, the entries of the YAML file `config`."""
    config, values = given.get("config"), {name: value for name, value in given.items() if name != "config"}
    return values if config is None else _read_config(config) | values


def _read_config(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise UserError('--config needs PyYAML: pip install "maefast[train]"') from error
    try:
        entries = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config must be a file; {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config must be YAML; {path} is not: {' '.join(str(error).split())}") from error
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise UserError(f"--config must hold options by name; {path} holds a {type(entries).__name__}")
    known = {entry.name: entry for entry in fields(Options)}
    values = dict[str, Any]()
    for name, value in entries.items():
        if name not in known:
            raise UserError(f"{path} must hold names of options; {str(name)!r} is none: {nearest(str(name), known)}")
        off = name == "amp" and value is False  # YAML reads off as false
        with user_errors(UserError, prefix=f"{path}: "):
            values[name] = _parsed(name, "off" if off else value, known[name].metadata["parse"])
    return values


def _parsed(name: str, value: Any, parse: Parse | None) -> Any:
    """Parse the value of a flag: a text, number, path, bool or list. Raises UserError."""
    if parse is None:
        if not isinstance(value, bool):
            raise UserError(f"{name} must be true or false; it is {value!r}")
        return value
    with user_errors(argparse.ArgumentTypeError, prefix=f"{name} "):
        return parse(",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
