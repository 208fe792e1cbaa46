"""Fine-tuning that is killed and resumed, its augmentation, its classifiers on corrupted images."""

import json
import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from images import Stripes
from support import assert_equal, refused, small_mae, threads

from maefast import cli
from maefast.train import checkpoints
from maefast.train.data import labelled
from maefast.train.errors import UserError
from maefast.train.evaluate import augment, classifier, corruptions, linprobe, log, robustness, supervised

FLAGS = ("--epochs=4", "--warmup_epochs=1", "--batch_size=4", "--accum_iter=2", "--clip_grad=1", "--lr=0.005", "--augment=rrc")
FLAGS += ("--mixup=0.8", "--cutmix=1", "--drop_path=0.2", "--ema=0.5")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module", autouse=True)
def parts(root):
    """The parts of the data set at any path; mae/ beside it is a checkpoint."""
    parts = {"train": Stripes(32), "val": Stripes(10, seed=1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(labelled, "open_images", lambda path, split, channels, exclude=None: parts[split])
        small_mae(img_size=64, patch_size=16).save_pretrained("mae")
        yield parts


def finetune(folder, *more):
    return cli.main(["finetune", "mae", "data", *FLAGS, "--eval_every=3", f"--output_dir={folder}", *more])


def slow_run(folder):
    torch.set_num_threads(1)
    add = log.Log.add

    def slowly(self, *scores):
        time.sleep(0.05)
        add(self, *scores)

    log.Log.add = slowly
    finetune(folder, "--resume=auto")


def test_a_killed_run_goes_on_as_if_nothing_had_happened(root, capsys):
    with threads(1):
        assert finetune("whole") == 0
        process = get_context("fork").Process(target=slow_run, args=("killed",))
        process.start()
        while len(checkpoints.find(root / "killed")) < 1:
            assert process.is_alive()
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert not (root / "killed" / "checkpoint.pth").exists()
        assert finetune("killed", "--resume=auto") == 0
    whole, killed = ((root / name / "log.txt").read_text() for name in ("whole", "killed"))
    assert whole == killed
    records = [json.loads(line) for line in whole.splitlines()]
    assert len({record["loss"] for record in records}) == 4
    assert [record["epoch"] for record in records if "top1" in record] == [3, 4]
    whole, killed = (torch.load(f"{name}/checkpoint.pth", weights_only=True)["model"] for name in ("whole", "killed"))
    assert_equal(dict(killed), dict(whole))
    assert [path.name for path in checkpoints.find(root / "killed")] == ["checkpoint-3.pth"]
    capsys.readouterr()
    assert finetune("killed", "--resume=auto", "--layer_decay=0.5") == 2
    assert "checkpoint-3.pth layer_decay is 0.75, here it is 0.5" in capsys.readouterr().err


def test_accumulated_batches_are_one_batch():
    x, y, weights = torch.randn(8, 3), torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]), []
    for size, accumulated in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        recipe = supervised.Recipe(3, 0, size, 3.0, 0.0, accum_iter=accumulated, clip_grad=0.1)
        assert recipe.peak == 3.0 * 8 / 256
        for _ in supervised.fit(model, torch.optim.SGD(model.parameters(), 1.0), supervised.in_memory(x, y), 8, recipe):
            pass
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights)


def test_learning_rate_of_the_probe_by_held_out_images(monkeypatch, capsys):
    """A rate of 0 learns nothing, too large a one diverges; of two as good the smaller is taken."""
    labels = torch.arange(60) % 3
    features = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    recipe = supervised.Recipe(10, 0, 10, 0.0, 0.0)
    monkeypatch.setattr(linprobe, "BLRS", (0.0, 3000.0, 4000.0, 1e38))
    with threads(1):
        assert linprobe.best_blr(features, labels, 3, recipe) == 3000.0
    assert "blr 3000: 6 of 6 held-out images are right" in capsys.readouterr().err
    monkeypatch.setattr(linprobe, "BLRS", (1e38,))
    with pytest.raises(supervised.Diverged, match="the loss is"):
        linprobe.best_blr(features, labels, 3, recipe)


def test_mixup_and_cutmix_by_hand():
    x, y = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 1, 8, 8), torch.eye(2)
    mixed, soft = augment.mixup(x, y, 0.75)
    assert mixed.flatten(1).unique(dim=1).flatten().tolist() == [0.25, 0.75]
    assert soft.tolist() == [[0.75, 0.25], [0.25, 0.75]]
    torch.manual_seed(3)
    for share in (0.0, 0.3, 0.9):
        mixed, soft = augment.cutmix(x, y, share)
        assert torch.equal(mixed[0], 1 - mixed[1])
        assert torch.equal(mixed.mean(dim=(1, 2, 3)), soft[:, 1])  # the share of ones
        assert soft[0, 0] >= share - 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_and_erasing(channels):
    """Images change by the generator's seed; erased pixels have the mean colour; labels stay."""
    pytest.importorskip("kornia")
    model = small_mae(in_chans=channels, mean=[0.5] * channels, std=[0.25] * channels)
    imgs, labels = Stripes(20, channels).pictures, torch.arange(20) % 2
    plain = (imgs / 255 - 0.5) / 0.25

    def changed(**options):
        torch.manual_seed(5)
        return augment.Augment(augment.Augmentation(**options), model, 2)(imgs, labels)

    x, y = changed(aa=augment.rand_policy("rand-m9-mstd0.5-inc1"))
    assert torch.equal(changed(aa=augment.rand_policy("rand-m9-mstd0.5-inc1"))[0], x)
    assert ((x - plain).abs().amax(dim=(1, 2, 3)) > 0).float().mean() > 0.5
    assert x.abs().max() <= 2
    assert torch.equal(y.argmax(dim=1), labels)
    x, _ = changed(reprob=1.0)
    erased = x != plain
    assert (x[erased] == 0).all()
    assert (erased.flatten(1).float().mean(dim=1) > 0.01).all()


def test_augmentation_errors(capsys, monkeypatch):
    monkeypatch.setattr("maefast.train.errors.find_spec", lambda name: None)
    assert finetune("out", "--reprob=0.25") == 2
    assert '--aa and --reprob need kornia: pip install "maefast[augment]"' in capsys.readouterr().err
    assert cli.main(["finetune", "mae", "data", "--resume=auto"]) == 2
    assert "--resume must be given together with --output_dir" in capsys.readouterr().err
    for text in ("rand-m11", "rand-n9", "augmix", "rand-m9-w0"):
        with pytest.raises(SystemExit):
            finetune("out", f"--aa={text}")
        assert "argument --aa: must be none or like rand-m9-n2-mstd0.5-inc1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tuned(parts):
    """A classifier that tells the stripes, and its images as a folder of arrays."""
    cli.main(["finetune", "mae", "data", "--epochs=6", "--warmup_epochs=1", "--batch_size=8", "--lr=0.005", "--output_dir=tuned"])
    for name, names in (("data", ["lying", "standing"]), ("other", ["x", "y"])):
        os.mkdir(name)
        np.save(f"{name}/images.npy", parts["val"].pictures.permute(0, 2, 3, 1).numpy())
        np.save(f"{name}/labels.npy", parts["val"].labels.numpy())
        Path(name, "classes.json").write_text(json.dumps(names))
    Path("map.txt").write_text("x standing\ny lying\n")  # the wrong way round
    os.mkdir("split")
    os.symlink("../data", "split/val")
    return "tuned/checkpoint.pth"


def test_robustness(tuned, parts, capsys):
    found = classifier.load_classifier(tuned)
    expected = found.model(parts["val"].pictures).argmax(dim=1) == parts["val"].labels
    assert expected.all()
    command = ["robustness", tuned, "split", "--kinds=none", "--folder=other", "--class_map=map.txt", "--out=out.json"]
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "clean: 1.0000 of 10 images\nfolder: 0.0000 of 10 images\n"
    expected = {"images": 10, "clean": 1.0, "corrupted": {}, "folder": 0.0, "folder_images": 10}
    assert json.loads(Path("out.json").read_text()) == expected


def test_corruptions(tuned, parts, capsys):
    pytest.importorskip("imagecorruptions", exc_type=ImportError)
    assert cli.main(["robustness", tuned, "split", "--kinds=contrast,gaussian_noise", "--severities=1,5", "--out=out.json"]) == 0
    result = json.loads(Path("out.json").read_text())
    assert result["clean"] == 1.0
    assert result["corrupted"].keys() == {"contrast", "gaussian_noise"}
    imgs = parts["val"].pictures[:3, :1, :28, :28]
    mild, strong = (corruptions.corrupted(imgs, "contrast", severity, 0) for severity in (1, 5))
    assert mild.shape == imgs.shape
    assert strong.float().std() < mild.float().std() < imgs.float().std()
    noisy = [corruptions.corrupted(imgs, "gaussian_noise", 3, seed) for seed in (0, 0, 1)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split", "--kinds=fogg"], "must be a known name; it is 'fogg': did you mean fog?"),
        (["split", "--severities=6"], "must be a known name; it is '6': choose from 1, 2, 3, 4, 5"),
        ([], "DATA or --folder must be given"),
        (["--folder=other"], "other must have only classes of the classifier; it has 'x': choose from lying, standing"),
        (["--folder=other", "--class_map=far.txt"], "--class_map must be a text file; far.txt cannot be read"),
    ],
)
def test_robustness_refuses(tuned, capsys, arguments, message):
    capsys.readouterr()
    assert message in refused(capsys, "robustness", tuned, *arguments, "--out=refused.json")
    assert not os.path.exists("refused.json")
    with pytest.raises(UserError, match="CHECKPOINT must be a classifier"):
        robustness.robustness(Path("mae"), robustness.Check(data=Path("split"), kinds=()))
