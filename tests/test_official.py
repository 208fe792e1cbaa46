"""Scripts around the official repository (tests/official) run with only their imports changed.

With maefast a script is a process whose folder holds no other model. The plain models, and these in
float64 as the truth, run the same file in the test's process.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from official import models_mae as plain_mae
from official import models_vit as plain_vit
from support import assert_equal, threads
from torch import Tensor, nn

from maefast.testing.errors import assert_close_to_float64

SCRIPTS = Path(__file__).parent / "official"
ROOT = SCRIPTS.parent.parent
PRETRAIN = [
    "--model=mae_vit_tiny_patch16", "--norm_pix_loss", "--input_size=48", "--accum_iter=2", "--batch_size=4", "--blr=0.05",
    '--sizes={"embed_dim": 64, "depth": 2, "num_heads": 2, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}',
]  # fmt: skip
FINETUNE = [
    "--model=vit_tiny_patch16", '--sizes={"embed_dim": 64, "depth": 2, "num_heads": 2}', "--input_size=64", "--nb_classes=4",
    "--accum_iter=2", "--batch_size=4",
]  # fmt: skip
PRECISIONS = {"fp16": [], "fp32": ["--no_amp"]}
Log = list[dict[str, Any]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Handwritten digits as PNG files, 16 of each of four classes."""
    from PIL import Image
    from sklearn.datasets import load_digits

    root = tmp_path_factory.mktemp("pictures")
    digits = load_digits(n_class=4)
    for label in range(4):
        (root / str(label)).mkdir()
        for i, picture in enumerate(digits.images[digits.target == label][:16]):
            Image.fromarray((picture * 15.9).astype("uint8")).save(root / str(label) / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def switched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the scripts, with maefast's modules in place of the official ones."""
    folder = tmp_path_factory.mktemp("switched")
    for name in ("common", "pretrain", "finetune"):
        text = (SCRIPTS / f"{name}.py").read_text()
        text, count = re.subn(r"^import (models_\w+)$", r"import maefast.\1 as \1", text, flags=re.MULTILINE)
        assert count == (name != "common")
        (folder / f"{name}.py").write_text(text)
    return folder


def start(folder: Path, script: str, output: Path, *options: object, rank: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, str(folder / f"{script}.py"), f"--output_dir={output}", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output


def records(output: Path, rank: int = 0) -> Log:
    return [json.loads(line) for line in (output / f"log-{rank}.txt").read_text().splitlines()]


def run_here(script: str, output: Path, *options: object, exact: bool = False) -> Log:
    """Run the script on the plain models, or on these in float64, which autocast leaves alone."""
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.syspath_prepend(str(SCRIPTS))
        for plain in (plain_mae, plain_vit):
            name = plain.__name__.split(".")[1]
            patch.setitem(sys.modules, name, in_float64(plain) if exact else plain)
        patch.setattr(sys, "argv", [script, f"--output_dir={output}", *map(str, options)])
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    return records(output)


def in_float64(module: ModuleType) -> ModuleType:
    def wide(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def make(**options: object) -> nn.Module:
            model = factory(**options)  # its weights are drawn in fp32
            model.register_forward_pre_hook(lambda module, args: (args[0].to(module.double().pos_embed.dtype), *args[1:]))
            return model

        return make

    out = ModuleType(module.__name__)
    out.__dict__.update({name: wide(value) for name, value in vars(module).items() if name.endswith("_patch16")})
    return out


def values(log: Log, key: str) -> Tensor:
    return torch.tensor([record[key] for record in log if key in record], dtype=torch.float64)


def assert_same(mine: Log, plain: Log, exact: Log, *keys: str) -> None:
    """Hold the run to the error rule beside the plain model's; as float64, it skips no step."""
    assert_equal([values(mine, "scale")] * 2, [values(plain, "scale"), values(exact, "scale")])
    for key in keys:
        assert_close_to_float64(key, values(mine, key).float(), values(plain, key).float(), values(exact, key))


@pytest.fixture(scope="module", params=PRECISIONS)
def pretrained(request, tmp_path_factory, pictures, switched) -> tuple[str, dict[str, Path]]:
    """Pre-train each model; return precision and folders. In fp16, maefast is a group of one."""
    options = [*PRETRAIN, f"--data_path={pictures}", *PRECISIONS[request.param]]
    folders = {name: tmp_path_factory.mktemp(f"{request.param}-{name}") for name in ("mine", "plain", "exact")}
    group = f"--dist_url=file://{folders['mine'] / 'group'}"
    distributed = [group, "--find_unused_parameters"] if request.param == "fp16" else []
    process = start(switched, "pretrain", folders["mine"], *options, *distributed)
    run_here("pretrain", folders["plain"], *options)
    run_here("pretrain", folders["exact"], *options, exact=True)
    finish(process)
    return request.param, folders


def test_pretraining(pretrained):
    _, folders = pretrained
    mine, plain, exact = (records(folders[name]) for name in ("mine", "plain", "exact"))
    assert_same(mine, plain, exact, "loss", "grad_norm")
    losses = values(exact, "loss")
    assert len(losses) == 32
    assert losses[-8:].mean() < 0.9 * losses[:8].mean()


def test_checkpoints_are_the_same_file_format(pretrained):
    _, folders = pretrained
    mine, plain = (torch.load(folders[name] / "checkpoint.pth", weights_only=False) for name in ("mine", "plain"))
    assert mine["args"].model == "mae_vit_tiny_patch16"
    shapes, groups = (
        [{name: value.shape for name, value in entries["model"].items()} for entries in (mine, plain)],
        [[len(group["params"]) for group in entries["optimizer"]["param_groups"]] for entries in (mine, plain)],
    )
    assert shapes[0] == shapes[1]
    assert groups[0] == groups[1]


WAYS = {  # with each precision
    "fp16": ["--global_pool", "--drop_path=0.2", "--layer_decay=0.75", "--blr=0.05", "--epochs=3"],
    "fp32": ["--linear_probe", "--blr=2"],
}


def test_finetuning_and_linear_probe(pretrained, pictures, switched, tmp_path):
    """From the plain checkpoint at another size; the plain script reads maefast's too."""
    precision, folders = pretrained
    options = [*FINETUNE, f"--data_path={pictures}", *WAYS[precision], *PRECISIONS[precision]]
    start_from = f"--finetune={folders['plain'] / 'checkpoint.pth'}"
    process = start(switched, "finetune", tmp_path / "mine", start_from, *options)
    plain = run_here("finetune", tmp_path / "plain", start_from, *options)
    exact = run_here("finetune", tmp_path / "exact", start_from, *options, exact=True)
    run_here("finetune", tmp_path / "other", f"--finetune={folders['mine'] / 'checkpoint.pth'}", *options, "--epochs=1")
    finish(process)
    mine = records(tmp_path / "mine")
    assert_same(mine, plain, exact, "loss", "logits")
    assert mine[-1]["accuracy"] >= 0.5  # of four classes; 0.5 itself with the draws of torch 2.11


def test_two_processes(pictures, switched, tmp_path):
    """Each has its own images and masks; gradients are shared without find_unused_parameters."""
    options = [*PRETRAIN, f"--data_path={pictures}", "--epochs=1", "--world_size=2", f"--dist_url=file://{tmp_path / 'group'}"]
    finish(*(start(switched, "pretrain", tmp_path, *options, rank=rank) for rank in range(2)))
    first, second = (records(tmp_path, rank) for rank in range(2))
    assert len(values(first, "loss")) == 8
    assert (values(first, "loss") != values(second, "loss")).all()
    assert torch.equal(values(first, "grad_norm"), values(second, "grad_norm"))
