"""`maefast pretrain`: a killed run that is resumed; batches, recipe, rewinds."""

import io
import os
import random
import re
import resource
import signal
import time
from contextlib import redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretraining import COUNT, ArrayImages, flags, losses, options, pictures, weights
from support import assert_equal, threads

import maefast
from maefast import cli
from maefast.train import checkpoints
from maefast.train.data import crops, order, pretraining
from maefast.train.errors import UserError
from maefast.train.pretrain import build
from maefast.train.pretrain.losses import LAG
from maefast.train.pretrain.trainer import pretrain


class SlowImages(ArrayImages):
    """Images that leave time to kill the process between its first checkpoints and its last."""

    def read(self, index, size=None, box=None):
        time.sleep(0.003)
        return super().read(index, size, box)


def survivor(output: Path, data: ArrayImages, workers: int) -> dict[str, object]:
    """Run twenty steps on one thread, as a forked process has no other."""
    torch.set_num_threads(1)
    changes = {"epochs": 10, "save_steps": 1, "accum_iter": 2, "warmup_epochs": 2, "blr": 1e-2, "clip_grad": 1.0}
    return pretrain(options(output, num_workers=workers, resume="auto", **changes), data)


def in_a_process_of_its_own(output: Path, workers: int) -> None:
    os.setsid()
    with (output.parent / f"{output.name}.txt").open("w") as stream, redirect_stdout(stream):
        survivor(output, SlowImages(pictures()), workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, uninterrupted: Path, number: int, workers: int) -> None:
    """The signal goes to the whole process group, as from a scheduler."""
    output = tmp_path / "killed"
    process = get_context("fork").Process(target=in_a_process_of_its_own, args=(output, workers))
    process.start()
    while len(checkpoints.find(output)) < 3:
        assert process.is_alive()
        time.sleep(0.001)
    os.killpg(process.pid, number)
    process.join(30)
    assert process.exitcode == (0 if number == signal.SIGTERM else -number)
    assert ("stopped by SIGTERM" in (tmp_path / "killed.txt").read_text()) == (number == signal.SIGTERM)
    assert len(losses(output)) < 10

    (output / ".checkpoint-9.pth.1").write_text("what a kill leaves of a checkpoint that is being written")
    with (output / "log.txt").open("a") as log:
        log.write('{"train_lr": 0.0')
    with threads(1):
        assert survivor(output, ArrayImages(pictures()), workers)["finished"]
    assert losses(output) == losses(uninterrupted)
    assert_equal(weights(output), weights(uninterrupted))
    assert not list(output.glob(".*"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    with threads(1):
        assert survivor(output, ArrayImages(pictures()), 0)["finished"]
    assert len({loss for _, loss, _ in losses(output)}) == 10  # or equality would mean little
    return output


def test_a_finished_run_has_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "images.npy", pictures())
    arguments = flags(tmp_path / "images.npy", tmp_path / "finished", epochs=1)
    assert cli.main(arguments) == 0
    before = weights(tmp_path / "finished")
    capsys.readouterr()
    assert cli.main([*arguments, "--resume=auto"]) == 0
    assert "done: 4 steps" in capsys.readouterr().out
    assert len(losses(tmp_path / "finished")) == 1
    assert_equal(weights(tmp_path / "finished"), before)


def test_checkpoints_are_official_and_loaded_by_maefast(tmp_path: Path) -> None:
    output = tmp_path / "kept"
    assert pretrain(options(output, epochs=4, keep=2, norm_pix_loss=True), ArrayImages(pictures()))["finished"]
    assert sorted(path.name for path in output.glob("*.pth")) == ["checkpoint-2.pth", "checkpoint-3.pth"]
    entries = checkpoints.read(output / "checkpoint-3.pth")
    assert {"model", "optimizer", "epoch", "scaler", "args"} <= entries.keys()
    assert (entries["epoch"], entries["args"].norm_pix_loss) == (3, True)
    model = maefast.MAE.from_pretrained(output / "checkpoint-3.pth")
    assert model.norm_pix_loss
    assert model.blocks[0].attn.num_heads == 2
    assert_equal(dict(model.state_dict()), dict(entries["model"]))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    pretrain(options(tmp_path, epochs=1), ArrayImages(pictures()))
    message = r"at step \d of epoch 1, with a learning rate of 6.29e\+29; the last good .* is .*-0.pth"
    with pytest.raises(UserError, match=message):
        pretrain(options(tmp_path, epochs=3, lr=1e30, resume="auto"), ArrayImages(pictures()))
    assert [path.name for path in checkpoints.find(tmp_path)] == ["checkpoint-0.pth"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_a_full_disk_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    pretrain(options(tmp_path), ArrayImages(pictures()))
    before = (tmp_path / "checkpoint-0.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(UserError, match=r"checkpoint-1.pth cannot be written: .*; the last good checkpoint is .*-0.pth"):
            pretrain(options(tmp_path, epochs=2, resume="auto"), ArrayImages(pictures()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint-0.pth").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir() if "checkpoint" in path.name) == ["checkpoint-0.pth"]


def test_reference_has_the_same_losses(tmp_path: Path) -> None:
    for name in ("ours", "plain"):
        pretrain(options(tmp_path / name, epochs=2, reference=name == "plain"), ArrayImages(pictures()))
    ours, plain = losses(tmp_path / "ours"), losses(tmp_path / "plain")
    assert ours != plain  # other arithmetic
    assert [loss for _, loss, _ in plain] == pytest.approx([loss for _, loss, _ in ours], rel=1e-5)


class Deadly(ArrayImages):
    """Its fifth image kills the process that reads it."""

    def read(self, index, size, box):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index, size, box)


def test_a_worker_that_dies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a process that loads images died \(DataLoader worker"):
        pretrain(options(tmp_path, num_workers=1), Deadly(pictures()))


@pytest.mark.parametrize("augment", pretraining.AUGMENTATIONS)
def test_batches_depend_on_neither_workers_nor_where_they_begin(augment: str) -> None:
    images = pretraining.Augmented(ArrayImages(pictures()), (16, 16), augment, True, seed=7)
    whole, rest = (
        [batch for batch, _ in pretraining.load_batches(images, pretraining.Keys(COUNT, 8, 4, 7, *keys), workers, False)]
        for keys, workers in (((range(2),), 0), ((range(1, 2), 1), 2))
    )
    assert (len(whole), len(rest)) == (8, 3)
    assert_equal(rest, whole[5:])
    assert sorted(order.epoch_order(COUNT, 7, 0)) == list(range(COUNT))
    assert order.epoch_order(COUNT, 7, 0) != order.epoch_order(COUNT, 7, 1) != order.epoch_order(COUNT, 8, 1)


def test_crops() -> None:
    draw = random.Random(0)
    assert crops.centred(20, 30, (16, 16)) == (5, 0, 25, 20)
    assert crops.centred(20, 30, (10, 30)) == (0, 5, 30, 15)
    assert crops.centred(100, 80, (1, 1), 0.5) == (20, 30, 60, 70)
    assert crops.centred(699, 699, (349, 349)) == (0, 0, 699, 699)  # 699 / 349 * 349 is more than 699
    drawn = [crops.resized_crop(20, 30, (16, 16), draw) for _ in range(500)]
    areas = [(right - left) * (bottom - top) / 600 for left, top, right, bottom in drawn]
    assert all(0 <= left < right <= 30 and 0 <= top < bottom <= 20 for left, top, right, bottom in drawn)
    assert 0.15 < min(areas) < 0.3
    assert 0.8 < max(areas) <= 1
    fixed = [crops.fixed_crop(20, 30, (16, 16), draw) for _ in range(100)]
    assert all(abs(right - left - 17.5) < 1e-9 and abs(bottom - top - 17.5) < 1e-9 for left, top, right, bottom in fixed)
    assert min(left for left, *_ in fixed) < 2
    assert max(right for _, _, right, _ in fixed) > 28


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ArrayImages(pictures(), broken=(0, 3, 4, 20))
    summary = pretrain(options(tmp_path, num_workers=1, epochs=2, pictures=2), data)
    out = capsys.readouterr().out
    assert summary["unreadable"] == 4
    assert all(out.count(f"skipped image-{index}.png cannot be read") == 1 for index in data.broken)
    assert "4 unreadable images skipped" in out
    with pytest.raises(UserError, match="--data_path must hold images that can be read"):
        pretrain(options(tmp_path / "none", num_workers=1), ArrayImages(pictures(), broken=tuple(range(COUNT))))


def test_learning_rate_and_accumulation(tmp_path: Path) -> None:
    """lr = blr x effective batch / 256; two half batches are a whole one, with the same masks."""
    changes = {"blr": 0.16, "epochs": 2, "warmup_epochs": 1, "mask_ratio": 0.5}
    pretrain(options(tmp_path / "whole", batch_size=16, **changes), ArrayImages(pictures()))
    pretrain(options(tmp_path / "halves", batch_size=8, accum_iter=2, **changes), ArrayImages(pictures()))
    whole, halves = losses(tmp_path / "whole"), losses(tmp_path / "halves")
    assert [rate for *_, rate in whole] == [rate for *_, rate in halves] == pytest.approx([0.005, 0.005])
    assert [loss for _, loss, _ in halves] == pytest.approx([loss for _, loss, _ in whole], rel=1e-4)


def test_other_channels_pictures_and_bf16(tmp_path: Path) -> None:
    """Greyscale images are read as (x/255 - 0.5)/0.5; the pictures are drawn; the loss falls."""
    data = ArrayImages(pictures(channels=1))
    pretrain(options(tmp_path, epochs=4, pictures=2, amp="bf16", blr=0.3, augment="none", warmup_epochs=1), data)
    assert sorted(path.name for path in (tmp_path / "reconstructions").iterdir()) == [f"epoch-000{i}.png" for i in range(4)]
    first, *_, last = (loss for _, loss, _ in losses(tmp_path))
    assert last < 0.9 * first
    model = maefast.MAE.from_pretrained(tmp_path / "checkpoint-3.pth")
    assert model.mean.tolist() == [0.5]


AXES = {"sampler": "block", "target": "pca", "mask_tokens_in_encoder": True, "augment": "rrc+jitter", "amp": "bf16"}


def test_the_papers_axes_go_on_exactly(tmp_path: Path) -> None:
    """The components come from the checkpoint: the data set of the resumed run has others."""
    pretrain(options(tmp_path / "whole", epochs=2, keep=3, save_steps=2, mask_ratio=0.5, **AXES), ArrayImages(pictures()))
    resume = str(tmp_path / "whole" / "checkpoint-1-2.pth")
    data = ArrayImages(pictures())
    first, data.read = data.read, lambda index, size, box: first(index, size, box) if index else first(1, size, box)
    used = set(order.epoch_order(COUNT, 0, 1)[16:32])
    assert 0 not in used  # so that the batches are the same
    changes = {"epochs": 2, "mask_ratio": 0.5, "resume": resume, **AXES}
    pretrain(options(tmp_path / "rest", **changes), data)
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[1:]
    got = weights(tmp_path / "rest")
    assert got["variant_pca_basis"].shape == (48, 24)
    assert_equal(got, weights(tmp_path / "whole"))
    with pytest.raises(UserError, match="the target is pca, here it is pixel"):
        pretrain(options(tmp_path / "rest", **changes | {"target": "pixel", "resume": "auto"}), data)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> ArrayImages:
    """White images make the loss NaN: in the second epoch's last step and the third's first."""
    build_model = build.build_model

    def build_poisoned(*args: object) -> torch.nn.Module:
        model = build_model(*args)
        model.register_forward_hook(
            lambda _, inputs, out: out._replace(loss=out.loss * torch.nan) if (inputs[0] == 255).all((1, 2, 3)).any() else None
        )
        return model

    monkeypatch.setattr("maefast.train.pretrain.trainer.build_model", build_poisoned)
    data = ArrayImages(pictures())
    index = order.epoch_order(COUNT, 0, 0)[-1]  # the one that the first epoch leaves out
    assert [order.epoch_order(COUNT, 0, epoch).index(index) // 8 for epoch in range(3)] == [4, 3, 0]
    data.pictures[index] = 255
    return data


@pytest.fixture(params=[0, 1])
def lag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are looked at so many steps later, as on a CPU or a GPU."""
    monkeypatch.setitem(LAG, "cpu", request.param)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.usefixtures("lag", "without_graphs")
def test_rewind(tmp_path: Path, poisoned: ArrayImages, capsys: pytest.CaptureFixture[str], graph: bool) -> None:
    """Back to the last checkpoint, past the bad batch; a run resumed nearby is the same."""
    changes = {"epochs": 3, "rewind": 2, "save_steps": 2, "keep": 9, "graph": graph}
    summary = pretrain(options(tmp_path / "whole", **changes), poisoned)
    assert (summary["rewinds"], summary["steps"], summary["finished"]) == (2, 12, True)
    out = capsys.readouterr().out
    assert re.search(r"the loss is nan at step 3 of epoch 1: the weights of .*checkpoint-1-2.pth.*rewind 1 of 2", out)
    assert re.search(r"the loss is nan at step 0 of epoch 2: the weights of .*checkpoint-1.pth.*rewind 2 of 2", out)
    assert "rewound 2 times " in out
    before, after = (checkpoints.read(tmp_path / "whole" / f"checkpoint-{at}.pth") for at in ("1-2", "1"))
    assert_equal(dict(before["model"]), dict(after["model"]))
    truth = weights(tmp_path / "whole")
    assert not torch.equal(after["model"]["cls_token"], truth["cls_token"])
    of_epochs = [loss for _, loss, _ in losses(tmp_path / "whole")]
    assert of_epochs[1] == before["run"]["loss_sum"] / 2
    assert np.isfinite(of_epochs).all()

    for at in ("1-2", "2-2"):
        resume = str(tmp_path / "whole" / f"checkpoint-{at}.pth")
        assert pretrain(options(tmp_path / at, **changes, resume=resume), poisoned)["rewinds"] == 2
        assert_equal(weights(tmp_path / at), truth)
        assert losses(tmp_path / at)[-1] == losses(tmp_path / "whole")[-1]


@pytest.mark.usefixtures("lag")
def test_no_rewind_is_left(tmp_path: Path, poisoned: ArrayImages) -> None:
    with pytest.raises(UserError, match=r"the loss is nan at step 0 of epoch 2, .* the last good checkpoint is .*-1.pth"):
        pretrain(options(tmp_path, epochs=3, rewind=1), poisoned)


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr", terminal := io.StringIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    pretrain(options(tmp_path, epochs=2), ArrayImages(pictures()))
    last = terminal.getvalue().split("\r")[-1]
    assert "8/8" in last
    assert all(figure in last for figure in ("epoch=1", "loss=", "lr=", "images/s=", "wait="))


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pretrain(options(tmp_path, epochs=2, pictures=2, log_dir=tmp_path / "events"), ArrayImages(pictures()))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    expected = [(epoch, pytest.approx(loss)) for epoch, loss, _ in losses(tmp_path)]
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == expected
    images = events.Images("reconstructions")
    assert [(event.step, event.height, event.width) for event in images] == [(0, 48, 32), (1, 48, 32)]
    shown = torch.tensor(np.asarray(Image.open(io.BytesIO(images[1].encoded_image_string)))).permute(2, 0, 1)
    centre = partial(crops.centred, size=(16, 16))
    originals = [ArrayImages(pictures()).read(index, (16, 16), centre) for index in (0, COUNT - 1)]
    assert torch.equal(shown[:, :16], torch.cat(originals, dim=2))
