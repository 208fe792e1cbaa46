"""Checkpoints that are refused with the way out, and frameworks' objects, which are never made."""

import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import Tensors, assert_loads, assert_refused, below, decoder_of, encoder_of, mmpretrain, trained
from torch import Tensor, nn

from maefast import MAE, checkpoint
from maefast.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def model() -> MAE:
    return trained()


def quantised(tensors: Tensors) -> object:
    layers = nn.Sequential(nn.Linear(32, 32))
    torch.backends.quantized.engine = torch.backends.quantized.supported_engines[-1]
    quantized = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear}, torch.qint8).state_dict()
    return {**tensors, **below("blocks.0.attn.", quantized)}


def changed(name: str, change: Callable[[Tensor], object]) -> Callable[[Tensors], object]:
    return lambda tensors: {**tensors, name: change(tensors[name])}


NO_PLACE, OPTIMIZER = "for which there is no place$", "holds the state of an optimizer, and no weights$"
QKV = "blocks.0.attn.qkv"
REFUSED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "optimizer": (lambda t: {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]}, OPTIMIZER),
    "DeepSpeed's": (lambda t: {"optimizer_state_dict": {"single_partition": torch.ones(9)}, "ds_version": "1"}, OPTIMIZER),
    "ZeRO-3": (lambda t: {"module": {n: torch.empty(0) for n in t}}, "holds empty tensors, .*zero_to_fp32.py$"),
    "flat": (lambda t: {"_fsdp_wrapped_module._flat_param": torch.ones(99)}, "flattened parameters of FSDP; save a full"),
    "an empty tensor": (changed("norm.bias", lambda x: x[:0]), "holds empty tensors, norm.bias"),
    "on the meta device": (lambda t: {n: x.to("meta") for n, x in t.items()}, "it has .*, without values on the device meta$"),
    "sparse": (changed("norm.bias", lambda x: x.to_sparse()), r"it has norm.bias, of layout torch.sparse_coo$"),
    "quantised tensor": (
        changed("norm.bias", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        r"must hold floating-point tensors; it has norm.bias of torch.qint8|a quantised tensor of torch.qint8$",
    ),
    "quantised layers": (quantised, "holds quantised weights; save the state_dict of the model before quantisation$"),
    "eight bits": (changed("norm.bias", lambda x: x.to(torch.float8_e4m3fn)), "it has norm.bias of torch.float8_e4m3fn$"),
    "bitsandbytes": (
        lambda t: {**t, f"{QKV}.weight": torch.ones(1536, 1, dtype=torch.uint8), f"{QKV}.absmax": torch.ones(3)},
        "it has blocks.0.attn.qkv.weight of torch.uint8$",
    ),
    "complex": (changed("norm.bias", lambda x: x.to(torch.complex64)), "it has norm.bias of torch.complex64$"),
    "too large": (changed("norm.bias", lambda x: x[:1].expand(1 << 30)), "norm.bias of shape .* is larger than the file$"),
    "BEiT": (
        lambda t: {**t, "blocks.0.attn.relative_position_bias_table": torch.ones(9, 4), "blocks.0.gamma_1": torch.ones(32)},
        f"relative_position_bias_table, blocks.0.gamma_1, {NO_PLACE}",
    ),
    "layer scale of mmpretrain": (
        lambda t: {"state_dict": mmpretrain(t) | {"backbone.layers.0.ln3.weight": torch.ones(32)}},
        f"it has layers.0.ln3.weight, {NO_PLACE}",
    ),
    "another decoder": (
        lambda t: below("backbone.", encoder_of(t)) | below("decoder.", decoder_of(t)) | {"decoder.extra.weight": torch.ones(3)},
        f"it has extra.weight, {NO_PLACE}",
    ),
    "twice": (
        lambda t: {**t, "module.norm.bias": torch.ones(32)},
        "holds norm.bias twice, with and without the prefix of a wrapper$",
    ),
    "positions of another grid in the decoder": (
        changed("decoder_pos_embed", lambda x: x[:, :5]),
        r"decoder_pos_embed of .* must be \(1, 17, (D\) for 16 patches|24\) beside its other tensors); its shape is \(1, 5",
    ),
    "positions of nothing": (changed("pos_embed", lambda x: x[:, :1]), "must have positions of patches"),
    "no class token": (lambda t: {n: x for n, x in t.items() if n != "cls_token"}, "it lacks cls_token$"),
    "decoder alone": (decoder_of, "holds no Masked Autoencoder: it has neither .* below any prefix, but mask_token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(model, tmp_path, case):
    make, message = REFUSED[case]
    torch.save(make(model.state_dict()), tmp_path / "a.pth")
    assert_refused(tmp_path / "a.pth", message)


def write_zip(path: Path, compression: int, name: str = "a/data.pkl") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, bytes(1000))
    return path


def script(path: Path) -> Path:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    return path


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"")
    return path


def deepspeed(path: Path, tag: str) -> Path:
    (folder(path, "latest") / "latest").write_text(tag)
    return path


FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "TorchScript": (script, "is a TorchScript archive, which holds code; save only the state_dict"),
    "npz": (lambda p: write_zip(p, zipfile.ZIP_STORED, "a.npy"), "is a zip archive that torch.save did not write"),
    "compressed": (lambda p: write_zip(p, zipfile.ZIP_DEFLATED), "is a compressed zip archive; torch.save writes it without"),
    "shards": (lambda p: folder(p, ".metadata", "__0_0.distcp"), "holds shards of torch.distributed.checkpoint; join them"),
    "sharded by ZeRO-3": (
        lambda p: folder(p, "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        "DeepSpeed's ZeRO-3 shards the weights; join them with its zero_to_fp32.py",
    ),
    "step outside": (lambda p: deepspeed(p, "../.."), "latest must name a folder beside it; it holds '../..'"),
    "step that is absent": (lambda p: deepspeed(p, "global_step3"), "latest must name a folder beside it"),
    "deep config": (lambda p: (folder(p) / "config.json").write_text("[" * 100_000) and p, "config.json is not JSON: "),
}


@pytest.mark.parametrize("case", FILES)
def test_refused_file(tmp_path, case):
    make, message = FILES[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(trained(), make(tmp_path / "a.pth"))
    assert "\n" not in str(caught.value)


class Log:
    """An object of a training framework; making one again is seen."""

    made = 0

    def __init__(self, value: float = 0.0):
        self.value = value

    def __setstate__(self, state: dict[str, object]) -> None:
        Log.made += 1


def save_foreign(make: Callable[[type], object], name: str, base: type, path: Path, legacy: bool = False) -> None:
    """Save what `make` makes of a class called `name`, whose module need not be installed."""
    module, _, attribute = name.rpartition(".")
    kind = type(attribute, (base,), {"__module__": module})
    parents = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    with pytest.MonkeyPatch.context() as patch:
        for parent in parents:
            if parent == module or parent not in sys.modules:
                patch.setitem(sys.modules, parent, types.ModuleType(parent))
        setattr(sys.modules[module], attribute, kind)
        torch.save(make(kind), path, _use_new_zipfile_serialization=not legacy)


def test_sharded_tensors_are_refused(tmp_path):
    name = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"
    save_foreign(lambda kind: {"model": {"norm.weight": kind()}}, name, Log, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds sharded tensors; save a full state_dict"):
        checkpoint.load(trained(), tmp_path / "a.pth")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_tensors_of_a_mesh_are_refused(model, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors = {name: distribute_tensor(t.detach(), mesh, [Shard(0)]) for name, t in model.state_dict().items()}
        torch.save({"model": tensors}, tmp_path / "a.pth")
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(CheckpointError, match="holds sharded tensors; save a full state_dict"):
        checkpoint.load(trained(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("base", "arguments", "name"),
    [
        (Log, {"value": 3.0}, "mmengine.logging.history_buffer.HistoryBuffer"),
        (Log, {"value": 3.0}, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
        (dict, {"lr": 1e-3}, "lightning_fabric.utilities.data.AttributeDict"),
        (dict, {"lr": 1e-3}, "mmengine.config.config.ConfigDict"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_weights_are_not_made(model, tmp_path, base, arguments, name, legacy):
    weights, before, path = below("model.", model.state_dict()), Log.made, tmp_path / "a.pth"
    save_foreign(lambda kind: {"state_dict": weights, "beside": {"log": [kind(**arguments)]}}, name, base, path, legacy)
    assert assert_loads(path, model).ignored == ("beside",)
    assert Log.made == before


def test_an_object_in_the_place_of_a_tensor(model, tmp_path):
    save_foreign(lambda kind: {"model": {**model.state_dict(), "norm.bias": kind()}}, "timm.Buffer", Log, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"it lacks norm.bias$"):
        checkpoint.load(trained(), tmp_path / "a.pth")


def test_numbers_of_numpy_and_paths_beside_the_weights(model, tmp_path):
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    beside = {"best": np.float64(0.5), "curve": np.arange(3), "folder": Path("out")}
    torch.save({"model": model.state_dict(), **beside}, tmp_path / "a.pth")
    assert assert_loads(tmp_path / "a.pth", model).ignored == tuple(beside)
