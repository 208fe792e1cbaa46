"""Bad checkpoints: one sentence, a model that stays as it was, no code run, nothing written."""

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import small_mae
from torch import Tensor, nn

from maefast import MAE, checkpoint
from maefast.checkpoint import CheckpointError

SIZES = {"img_size": 32, "patch_size": 8}
HEADS = {"num_heads": 4, "decoder_num_heads": 3}
Tensors = dict[str, Tensor]


def healthy(**options: object) -> Tensors:
    return small_mae(**{**SIZES, **options}).state_dict()


def save(path: Path, tensors: Tensors) -> Path:
    torch.save({"model": tensors}, path)
    return path


def holding(entries: object) -> Callable[[Path], Path]:
    return lambda folder: torch.save(entries, folder / "a.pth") or folder / "a.pth"


def save_safetensors(path: Path) -> Path:
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(healthy(), path)
    return path


def cut(path: Path, share: float) -> Path:
    os.truncate(path, int(share * path.stat().st_size))
    return path


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def overwritten(path: Path, start: int, count: int) -> Path:
    content = path.read_bytes()
    return written(path, content[:start] + b"\xff" * count + content[start + count :])


def changed(**tensors: Tensor | None) -> Callable[[Path], Path]:
    """A checkpoint with tensors in place of others, or without them where None."""
    merged = healthy() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in merged.items() if tensor is not None}
    return lambda folder: save(folder / "changed.pth", kept)


def resnet(folder: Path) -> Path:
    layers = OrderedDict(conv1=nn.Conv2d(3, 8, 7, bias=False), bn1=nn.BatchNorm2d(8), fc=nn.Linear(8, 10))
    torch.save(nn.Sequential(layers).state_dict(), folder / "resnet.pth")
    return folder / "resnet.pth"


def folder_of(files: dict[str, bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "model").mkdir()
        for name, written in files.items():
            (folder / "model" / name).write_bytes(written)
        return folder / "model"

    return make


def index_of(shards: object) -> dict[str, bytes]:
    return {"model.safetensors.index.json": json.dumps({"weight_map": shards}).encode()}


def no_value(folder: Path) -> Path:
    """transformers' layout in which query, key and value do not fit each other."""
    block = "vit.encoder.layer.0.attention.attention"
    tensors = {f"{block}.{part}.weight": torch.ones(32, 32) for part in ("query", "key")}
    tensors["vit.embeddings.patch_embeddings.projection.weight"] = torch.ones(32, 3, 8, 8)
    return save(folder / "vit.bin", tensors)


def with_config(**entries: object) -> Callable[[Path], Path]:
    files = folder_of({"config.json": json.dumps(entries).encode()})
    return lambda folder: save(files(folder) / "pytorch_model.bin", healthy()).parent


def of_transformers(**entries: object) -> Callable[[Path], Path]:
    return with_config(hidden_size=32, num_attention_heads=4, image_size=32, **entries)


def of_maefast(**entries: object) -> Callable[[Path], Path]:
    return with_config(**{"embed_dim": 32, "img_size": 32, **HEADS, **entries})


BAD = {
    "cut, zip": (lambda folder: cut(save(folder / "a.pth", healthy()), 0.5), r"a.pth is damaged: File is not a zip file"),
    "cut, safetensors": (lambda folder: cut(save_safetensors(folder / "a.safetensors"), 0.9), r"a.safetensors is damaged: "),
    "cut in the header": (lambda folder: cut(save_safetensors(folder / "a.safetensors"), 0.01), r"a.safetensors is damaged: "),
    "header overwritten": (lambda folder: overwritten(save_safetensors(folder / "a.safetensors"), 20, 40), r"is damaged: "),
    "pickle overwritten": (lambda folder: overwritten(save(folder / "a.pth", healthy()), 200, 100), r"a.pth is damaged: "),
    "empty": (
        lambda p: written(p / "a.pth", b""),
        r"a.pth is neither a file of torch.save nor of safetensors, or it is damaged",
    ),
    "lfs": (
        lambda p: written(p / "a.safetensors", b"version https://git-lfs"),
        "neither a file of torch.save nor of safetensors",
    ),
    "old pickle, damaged": (lambda p: written(p / "a.pth", b"\x80\x02\x8a\nl\xfc\x9c"), r"a.pth is damaged: "),
    "no dict": (holding([1, 2]), r"must hold a dict of tensors.*a list"),
    "no tensors": (holding({"epoch": 3}), r"holds no state_dict: neither it nor any of its entries has a tensor by name"),
    "numbered tensors": (holding({0: torch.ones(2)}), r"holds no state_dict"),
    "cnn": (resnet, r"holds no Masked Autoencoder: it has neither patch_embed.proj.weight .* but conv1.weight, .* \(8 in all\)"),
    "block missing": (changed(blocks__1__norm2__bias=None), r"it lacks blocks.1.norm2.bias$"),
    "block too many": (changed(blocks__5__norm1__bias=torch.ones(32)), r"blocks.5.norm1.bias"),
    "half a decoder": (changed(decoder_embed__weight=None), r"lacks decoder_embed.weight$"),
    "another tensor": (changed(blocks__0__ls1__gamma=torch.ones(32)), r"it has blocks.0.ls1.gamma, for which there is no place$"),
    "shape": (changed(norm__bias=torch.ones(33)), r"norm.bias .*\(33,\).*\(32,\)|norm.bias .*\(32,\).*\(33,\)"),
    "dimensions": (changed(pos_embed=torch.ones(17, 32)), r"pos_embed of .* must have 3 dimensions; its shape is \(17, 32\)"),
    "integers": (changed(norm__bias=torch.ones(32, dtype=torch.int8)), r"floating-point tensors; it has norm.bias of torch.int8"),
    "qkv": (no_value, r"query, key and value of one shape and dtype for blocks.0.attn.qkv.weight; it has query \(32, 32\), key"),
    "empty folder": (folder_of({"README.md": b""}), r"holds no weights: no file in it ends in .safetensors, .pth, .pt, .bin"),
    "two files": (folder_of({"a.pth": b"", "b.bin": b""}), r"holds several checkpoints, a.pth, b.bin; name one of them"),
    "config": (folder_of({"config.json": b"{", "model.safetensors": b""}), r"config.json is not JSON: "),
    "config of a list": (folder_of({"config.json": b"[]"}), r"config.json must hold a JSON object; it holds a list"),
    "index": (folder_of(index_of(["a"])), r"has no weight_map of tensors to files of its folder"),
    "index outside": (folder_of(index_of({"a": "../b.safetensors"})), r"has no weight_map of tensors to files of its folder"),
    "shard missing": (folder_of(index_of({"a": "b.safetensors"})), r"names b.safetensors, which is not in its folder"),
    "activation": (with_config(hidden_size=32, hidden_act="relu"), r"hidden_act is relu, where MAE has gelu"),
    "config without heads": (with_config(hidden_size=32), r"the config of .* is not that of a Masked Autoencoder: .*heads"),
    "heads in words": (with_config(hidden_size=32, num_attention_heads="four", image_size=32), r"num_heads must be a positive"),
    "target in words": (of_maefast(norm_pix_loss="yes"), r"norm_pix_loss must be true or false; it is 'yes'"),
    "heads that do not divide the width": (of_maefast(num_heads=5), r"num_heads is 5 in .* and 4 in MAE$"),
    "eps in words": (of_transformers(layer_norm_eps="small"), r"'small'"),
    "eps of nan": (of_transformers(layer_norm_eps=float("nan")), r"layer_norm_eps must be a number, 0 or more; it is nan"),
    "mask ratio": (of_transformers(mask_ratio=2), r"mask_ratio must be in \[0, 1\); it is 2"),
    "mean of a number": (of_maefast(mean=0.5, std=[0.5] * 3), r"mean must be a list of numbers; it is 0.5"),
    "std of zero": (of_maefast(mean=[0.5] * 3, std=[0.5, 0, 0.5]), r"mean and std must be given together, std positive"),
    "heads of the config": (of_maefast(num_heads=8), r"num_heads is 8 in .* and 4 in MAE"),
    "size of the config": (of_maefast(img_size=48), r"has positions of 16 patches, and not of 6 x 6 as is said of it"),
}
# What a conversion has no reason to refuse.
LOADING_ALONE = {"heads of the config", "heads that do not divide the width"}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint(tmp_path, case):
    make, message = BAD[case]
    path = make(tmp_path)
    model = small_mae(**SIZES, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(model, path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    if case not in LOADING_ALONE:
        with pytest.raises(CheckpointError) as caught:
            MAE.from_pretrained(path, **HEADS)
        there = sorted(tmp_path.iterdir())
        for out, to in (("out.pth", "official"), ("out", "transformers"), ("out.safetensors", "timm")):
            with pytest.raises(CheckpointError) as caught:
                checkpoint.convert(path, tmp_path / out, to, **HEADS)
            assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == there


class Code:
    """Unpickled without care, this makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(tmp_path, legacy):
    trap, path = tmp_path / "trap", tmp_path / "a.pth"
    torch.save({"model": healthy(), "args": Code(trap)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"a.pth holds a posix.mkdir, which could run code when it is read, and is refused"):
        checkpoint.load(small_mae(**SIZES), path)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Code(trap)))
    assert trap.exists()  # it would have


def test_a_pickled_model_is_named(tmp_path):
    torch.save(small_mae(**SIZES), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds a maefast.model.MAE, .* save only the state_dict"):
        checkpoint.load(small_mae(**SIZES), tmp_path / "a.pth")


def test_a_model_of_another_size(tmp_path):
    path = save(tmp_path / "a.pth", healthy())
    with pytest.raises(CheckpointError, match=r"does not fit MAE: mask_token is .* in the checkpoint and .* in the model"):
        MAE.from_pretrained(path, decoder_embed_dim=36, **HEADS)
    with pytest.raises(CheckpointError, match=r"it lacks blocks.2.norm1.weight"):
        MAE.from_pretrained(path, depth=3, **HEADS)


def test_no_model(tmp_path):
    path = save(tmp_path / "a.pth", healthy())
    with pytest.raises(TypeError, match=r"model must be an MAE or its encoder; it is a Linear"):
        checkpoint.load(nn.Linear(2, 2), path)


def test_heads_that_nothing_tells(tmp_path):
    path = save(tmp_path / "a.pth", healthy())
    message = "num_heads must be given: .*a.pth does not store it, and 32 is not among .* 768, 1024"
    with pytest.raises(CheckpointError, match=message):
        MAE.from_pretrained(path)
    with pytest.raises(CheckpointError, match=r"^decoder_num_heads must be given"):
        checkpoint.convert(path, tmp_path / "out", "transformers", num_heads=4)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("options", [{"img_size": (32, 48)}, {"patch_size": (8, 16)}])
def test_transformers_takes_squares(tmp_path, options):
    path, (name,) = save(tmp_path / "a.pth", healthy(**options)), options
    with pytest.raises(CheckpointError, match=rf"{name} of .* is \d+ x \d+; transformers' ViTMAE takes only squares"):
        checkpoint.convert(path, tmp_path / "out", "transformers", **HEADS)
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("out", "to", "error", "message"),
    [
        ("out.pth", "keras", CheckpointError, "to must be one of official, transformers, timm; it is 'keras'"),
        ("out.npz", "official", CheckpointError, r"out must end in .pth or .pt or .bin for the layout official; it is .*out.npz"),
        ("out.safetensors", "transformers", CheckpointError, "out must be a folder for the layout transformers"),
        ("a.pth", "official", FileExistsError, r"out must not exist yet; .*a.pth does"),
        ("link.pth", "timm", FileExistsError, r"out must not exist yet; .*link.pth does"),
        ("far/out.pth", "official", FileNotFoundError, r"out must be in a folder that exists; .*far does not"),
    ],
)
def test_bad_output(tmp_path, out, to, error, message):
    path = save(tmp_path / "a.pth", healthy())
    before = path.read_bytes()
    (tmp_path / "link.pth").symlink_to("nowhere")
    with pytest.raises(error, match=message):
        checkpoint.convert(path, tmp_path / out, to, **HEADS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.pth", "link.pth"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(("out", "to"), [("out.pth", "official"), ("out", "transformers"), ("out.safetensors", "timm")])
def test_an_output_that_fails_half_way(tmp_path, monkeypatch, out, to):
    path = save(tmp_path / "a.pth", healthy())

    def half(entries: object, file: Path, **options: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    if to != "official":
        monkeypatch.setattr(pytest.importorskip("safetensors.torch"), "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.convert(path, tmp_path / out, to, **HEADS)
    assert sorted(tmp_path.iterdir()) == [path]


def test_safetensors_is_not_installed(tmp_path, monkeypatch):
    path = save_safetensors(tmp_path / "a.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(RuntimeError, match=re.escape('needs safetensors.torch: pip install "maefast[checkpoints]"')):
        checkpoint.load(small_mae(**SIZES), path)
    with pytest.raises(RuntimeError, match=re.escape('pip install "maefast[checkpoints]"')):
        small_mae(**SIZES).save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.pth does not exist"):
        MAE.from_pretrained(tmp_path / "a.pth")


def test_heads_of_a_config_that_do_not_divide_the_width(tmp_path):
    path = with_config(embed_dim=32, img_size=32, num_heads=5, decoder_num_heads=3)(tmp_path)
    with pytest.raises(CheckpointError, match=r"num_heads of .* is 5, which does not divide the width 32$"):
        MAE.from_pretrained(path)
