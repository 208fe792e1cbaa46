"""`maefast pretrain --graph` without a GPU: conftest.py has a stand-in for the capture.

Rates are numbers that fp32 holds exactly, as a graph has them, so that runs agree bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import assert_same_weights
from pretraining import ArrayImages, flags, options, pictures, records
from support import refused

from maefast import cli
from maefast.train import checkpoints
from maefast.train.errors import UserError
from maefast.train.group import Group
from maefast.train.pretrain.build import check_options
from maefast.train.pretrain.trainer import Trainer, pretrain
from maefast.train.step import GraphedStep

RATE = 2.0**-6
CONSTANT = {"lr": RATE, "min_lr": RATE}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, without_graphs: None) -> list[tuple[str, ...]]:
    """The names of what each graph that is captured reads."""
    captured: list[tuple[str, ...]] = []
    build = GraphedStep.__init__

    def recorded(self, *args, **kwargs):
        build(self, *args, **kwargs)
        captured.append(tuple(self._inputs))

    monkeypatch.setattr(GraphedStep, "__init__", recorded)
    return captured


def run(output: Path, data: ArrayImages | None = None, **changes: object) -> dict[str, object]:
    return pretrain(options(output, **(CONSTANT | changes)), data or ArrayImages(pictures()))


def last(output: Path) -> dict[str, object]:
    return checkpoints.read(checkpoints.find(output)[-1])


def assert_same_run(got: Path, truth: Path) -> None:
    mine, theirs = last(got), last(truth)
    assert_same_weights(mine["model"], theirs["model"])
    for index, state in theirs["optimizer"]["state"].items():
        assert_same_weights(mine["optimizer"]["state"][index], state)
    assert [group["lr"] for group in mine["optimizer"]["param_groups"]] == [RATE, RATE]
    assert torch.equal(mine["run"]["masks"], theirs["run"]["masks"])
    for name in ("epoch", "train_loss", "train_lr"):
        assert [record[name] for record in records(got)] == [record[name] for record in records(truth)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"clip_grad": 0.05}, {"amp": "bf16"}, {"target": "pca"}, {"mask_tokens_in_encoder": True, "sampler": "block"}],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_is_the_run_without_it(tmp_path: Path, steps: list[tuple[str, ...]], changes: dict[str, object]) -> None:
    """Masks, losses, weights and moments are equal, with one graph for the whole run."""
    run(tmp_path / "plain", epochs=2, **changes)
    run(tmp_path / "graph", epochs=2, graph=True, **changes)
    assert steps == [("imgs", "noise")]
    assert_same_run(tmp_path / "graph", tmp_path / "plain")


def test_clipping_is_in_the_graph(tmp_path: Path, steps: list[tuple[str, ...]]) -> None:
    for name, norm in (("clipped", 1e-3), ("free", None)):
        trainer = Trainer(options(tmp_path / name, graph=True, clip_grad=norm), ArrayImages(pictures()), Group())
        trainer.train()
        gradient = torch.cat([p.grad.flatten() for p in trainer.state.model.parameters() if p.grad is not None])
        assert (gradient.norm().item() == pytest.approx(1e-3, rel=1e-3)) == (norm is not None)


@pytest.mark.parametrize(("first", "then"), [(True, True), (True, False), (False, True)], ids=str)
def test_goes_on_exactly(tmp_path: Path, steps: list[tuple[str, ...]], first: bool, then: bool) -> None:
    """From the middle of an epoch, with the graph or without it, whichever wrote the checkpoint."""
    run(tmp_path / "whole", epochs=2)
    run(tmp_path / "first", epochs=2, save_steps=3, keep=9, graph=first)
    run(tmp_path / "then", epochs=2, graph=then, resume=str(tmp_path / "first" / "checkpoint-0-3.pth"))
    assert len(steps) == first + then
    assert_same_weights(last(tmp_path / "then")["model"], last(tmp_path / "whole")["model"])


def test_learning_rates_of_a_schedule(tmp_path: Path, steps: list[tuple[str, ...]]) -> None:
    """log.txt and the checkpoint have them as without the graph, which has them in fp32."""
    for graph in (False, True):
        pretrain(options(tmp_path / str(graph), epochs=3, warmup_epochs=1, graph=graph), ArrayImages(pictures()))
    rates = [[record["train_lr"] for record in records(tmp_path / str(graph))] for graph in (False, True)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 3
    assert [group["lr"] for group in last(tmp_path / "True")["optimizer"]["param_groups"]] == [rates[0][-1]] * 2


def run_on_floats(folder: Path, count: int, missing: object, **changes: object) -> None:
    """Run on images without the values at `missing`, with the graph and without: the same run."""
    values = np.random.default_rng(0).normal(size=(count, 16, 16)).astype("float32")
    values[missing] = np.nan
    np.save(folder / "values.npy", values)
    changes |= {"mean": 0.0, "std": 1.0, "augment": "none", "warmup_epochs": 0, **CONSTANT}
    for name, graph in (("plain", []), ("graph", ["--graph"])):
        assert cli.main([*flags(folder / "values.npy", folder / name, **changes), *graph]) == 0
    assert_same_run(folder / "graph", folder / "plain")


def test_missing_values_have_a_graph_of_their_own(tmp_path: Path, steps: list[tuple[str, ...]]) -> None:
    """Batches in which no value is missing keep the one without weights."""
    run_on_floats(tmp_path, count=24, missing=(3, slice(5)))
    assert sorted(steps) == [("imgs", "noise"), ("imgs", "noise", "weights")]


def test_a_batch_without_values_is_no_graph(tmp_path: Path, steps: list[tuple[str, ...]]) -> None:
    run_on_floats(tmp_path, count=6, missing=3, batch_size=1)
    assert steps == [("imgs", "noise")]


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--device=cpu", "--graph must run on a GPU; the device is cpu"),
        ("--reference", "--graph must be given without --reference, which is the plain eager model"),
        ("--fsdp", "--graph must be given without --fsdp, which runs in several processes"),
        ("--accum_iter=2", "--graph must be given with --accum_iter 1, since a graph holds one forward pass; it is 2"),
        ("--amp=fp16", "--graph must be given without --amp fp16, which needs a gradient scaler; bf16 needs none"),
    ],
)
def test_what_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, reason: str) -> None:
    np.save(tmp_path / "images.npy", pictures())
    assert reason in refused(capsys, *flags(tmp_path / "images.npy", tmp_path / "out"), "--graph", *flag.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 4])
def test_several_processes_are_refused(tmp_path: Path, count: int) -> None:
    """Even one, where a launcher started it: its gradients would pass through DDP."""
    message = rf"--graph must run in one process, without a launcher; there are {count}$"
    with pytest.raises(UserError, match=message):
        check_options(options(tmp_path, graph=True), Group(0, count, 0), batch=8 * count, images=40)
