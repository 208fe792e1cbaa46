"""extract, knn, linprobe, partial, finetune and reconstruct on a data set in memory."""

import numpy as np
import pretraining
import pytest
import support
import torch
from images import Stripes, batches_of
from support import small_mae

from maefast import VisionTransformer, checkpoint, cli
from maefast.train.data import crops, labelled
from maefast.train.evaluate import commands, features, linprobe, supervised

SHORT = ("--epochs=6", "--warmup_epochs=1", "--batch_size=8")


@pytest.fixture(autouse=True)
def parts(tmp_path, monkeypatch):
    """The parts of the data set that is found at any path; beside it, mae/, a checkpoint."""
    parts = {"train": Stripes(32), "val": Stripes(10, seed=1), None: Stripes(6)}
    monkeypatch.chdir(tmp_path)
    for module in (commands, labelled):
        monkeypatch.setattr(module, "open_images", lambda path, split, channels, exclude=None: parts[split])
    mae().save_pretrained("mae")
    return parts


def mae():
    return small_mae(img_size=64, patch_size=16)


def run(capsys, *arguments):
    """What the command prints on stdout."""
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def weights(folder, entry="model"):
    return torch.load(f"{folder}/checkpoint.pth", weights_only=True)[entry]


def test_extract(capsys, tmp_path, parts):
    printed = run(capsys, "extract", "mae", "data", "out.npy", "--kind=all", "--batch_size=4")
    assert printed == "out.npy: features of 6 images, 17 x 32 each\n"
    torch.testing.assert_close(torch.from_numpy(np.load("out.npy")), mae().encode(parts[None].pictures).detach())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mae", "out.npy"]


def test_knn(capsys, parts):
    assert run(capsys, "knn", "mae", "data", "--k=3") == "top-1 1.0000 (10 of 10 images)\n"
    parts["train"].labels = 1 - parts["train"].labels
    assert run(capsys, "knn", "mae", "data", "--k=3", "--kind=mean") == "top-1 0.0000 (0 of 10 images)\n"


def test_label_fraction_takes_as_much_of_each_class(parts):
    parts["train"].labels[:24] = 0
    _, taken, _ = labelled.Labelled("data", label_fraction=0.25).opened(3, seed=0)
    labels = parts["train"].labels
    assert torch.bincount(labels[taken]).tolist() == [round(n / 4) for n in torch.bincount(labels).tolist()]


def test_linprobe(capsys, tmp_path, parts):
    """Learns to tell the stripes, and the probe that is written scores what was printed."""
    assert run(capsys, "linprobe", "mae", "data", *SHORT, "--blr=100", "--output_dir=out") == "top-1 1.0000 (10 of 10 images)\n"
    assert [record["epoch"] for record in pretraining.records(tmp_path / "out")] == [1, 2, 3, 4, 5, 6]
    probe = linprobe.LinearProbe(32, 2)
    probe.load_state_dict(weights("out", "probe"))
    logits = probe.eval()(features.pooled(features.load_encoder("mae"), parts["val"].pictures, "cls"))
    assert torch.equal(logits.argmax(dim=1), parts["val"].labels)


def test_linprobe_computes_the_same_once_and_per_step(capsys, tmp_path, monkeypatch):
    """With views that do not vary, a probe on the encoder learns what one on its features does."""
    run(capsys, "linprobe", "mae", "data", *SHORT, "--output_dir=once")
    monkeypatch.setattr(labelled, "drawn", lambda draw, size, *_: crops.still(size))
    run(capsys, "linprobe", "mae", "data", *SHORT, "--augment=rrc", "--output_dir=steps")
    torch.testing.assert_close(weights("steps", "probe"), weights("once", "probe"))


@pytest.mark.parametrize("options", [("--augment=rrc", "--cls_token", "--drop_path=0.2"), ("--ema=0.5", "--amp=bf16")])
def test_finetune(capsys, tmp_path, parts, options):
    """Learns the stripes; the same command gives the same weights; they score what was printed."""
    command = ("finetune", "mae", "data", *SHORT, "--lr=0.005", "--layer_decay=0.9", *options)
    printed = run(capsys, *command, "--output_dir=one")
    assert run(capsys, *command, "--output_dir=two") == printed
    one, two = map(weights, ("one", "two"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    records = pretraining.records(tmp_path / "one")
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert records[-1]["top1"] >= 0.9
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 2}
    tuned = VisionTransformer(**sizes, global_pool="--cls_token" not in options)
    report = checkpoint.load(tuned, "one/checkpoint.pth")
    assert report.missing == report.unexpected == ()
    autocast = torch.bfloat16 if "--amp=bf16" in options else None
    correct = supervised.count_correct(tuned, batches_of(parts["val"].pictures, parts["val"].labels), 10, autocast=autocast)
    assert printed == f"top-1 {correct / 10:.4f} ({correct} of 10 images)\n"


def test_partial_changes_the_last_block_alone(capsys):
    run(capsys, "partial", "mae", "data", *SHORT, "--blocks=1", "--cls_token", "--output_dir=out")
    tuned, before = weights("out"), mae().state_dict()
    changed = {name for name, tensor in tuned.items() if name not in before or not torch.equal(tensor, before[name])}
    assert changed == {name for name in tuned if name.startswith(("head.", "norm.", "blocks.1."))}


def test_random_init(capsys):
    run(capsys, "finetune", "mae", "data", "--random_init", *SHORT, "--lr=0", "--output_dir=out")
    tuned, before = weights("out"), mae().state_dict()
    assert torch.equal(tuned["pos_embed"], before["pos_embed"])
    assert not torch.equal(tuned["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])


def test_reconstruct(capsys, tmp_path):
    image = pytest.importorskip("PIL.Image")
    assert run(capsys, "reconstruct", "mae", "data", "out.png", "--count=3") == "out.png: 3 images\n"
    with image.open("out.png") as picture:
        assert picture.width > picture.height > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mae", "out.png"]


COMMANDS = {name: (name, "mae", "data") for name in ("knn", "linprobe", "finetune")} | {
    "partial": ("partial", "mae", "data", "--blocks=1"),
    "extract": ("extract", "mae", "data", "out.npy"),
    "reconstruct": ("reconstruct", "mae", "data", "out.png"),
}


def refused(capsys, tmp_path, *arguments):
    """The one line on stderr of a command that exits with 2 and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    line = support.refused(capsys, *arguments)
    assert sorted(tmp_path.rglob("*")) == before
    return line


@pytest.mark.parametrize("name", COMMANDS)
def test_checkpoint_that_does_not_fit(capsys, tmp_path, name, parts):
    _, _, *rest = COMMANDS[name]
    torch.save({"model": {"weight": torch.zeros(2, 2)}}, "other.pth")
    assert "other.pth" in refused(capsys, tmp_path, name, "other.pth", *rest)
    assert "nowhere.pth does not exist" in refused(capsys, tmp_path, name, "nowhere.pth", *rest)
    assert "60" in refused(capsys, tmp_path, *COMMANDS[name], "--input_size=60")
    for part in parts.values():
        part.channels = 1
    assert "DATA must have 3 channels, as the checkpoint's images have; it has 1" in refused(capsys, tmp_path, *COMMANDS[name])


@pytest.mark.parametrize("name", ["knn", "linprobe", "finetune", "partial"])
def test_data_without_labels(capsys, tmp_path, name, parts):
    parts["val"].labels[3] = -1
    assert "1 of 10 images in the val split of data have none" in refused(capsys, tmp_path, *COMMANDS[name])
    parts["val"].classes = ("lying", "else")
    parts["val"].labels[3] = 0
    assert "DATA must have the same classes in both splits" in refused(capsys, tmp_path, *COMMANDS[name])
    parts["train"].classes = ("lying",)
    assert "DATA must have two classes or more; the train split of data has 1" in refused(capsys, tmp_path, *COMMANDS[name])


def test_statistics_that_nothing_tells(capsys, tmp_path, parts):
    torch.save(small_mae(in_chans=4, embed_dim=192, num_heads=3, img_size=64, patch_size=16).state_dict(), "four.pth")
    parts[None] = Stripes(6, channels=4)
    line = refused(capsys, tmp_path, "extract", "four.pth", "data", "out.npy")
    assert "--mean and --std must be given for images of 4 channels" in line
    run(capsys, "extract", "four.pth", "data", "out.npy", "--mean=.5,.5,.5,.5", "--std=.2,.2,.2,.2")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("knn", ("--k=40",), "--k must be at most 32, the number of training images; it is 40"),
        ("knn", ("--label_fraction=0.01",), "--label_fraction must keep an image of each class in data; 0.01 does not"),
        ("knn", ("--k=0",), "argument --k: must be a whole number, 1 or more; it is '0'"),
        ("knn", ("--temperature=nan",), "argument --temperature: must be a number more than 0"),
        ("knn", ("--eval_split=dev",), "argument --eval_split: must be a known name; it is 'dev': choose from train, val, test"),
        ("knn", ("--device=warp",), "--device must be cpu, cuda or cuda:N; it is 'warp'"),
        ("linprobe", ("--batch_size=64",), "--batch_size must be at most 32"),
        ("linprobe", ("--blr=-1",), "argument --blr: must be a number, 0 or more; it is '-1'"),
        ("linprobe", ("--batch_size=8", "--output_dir=mae/config.json"), "--output_dir must be a folder that can be written"),
        ("finetune", ("--epochs=2", "--batch_size=8"), "--warmup_epochs must be at most --epochs, 2; it is 5"),
        ("finetune", ("--drop_path=1",), "argument --drop_path: must be a number, 0 or more and below 1; it is '1'"),
        ("partial", ("--blocks=3", "--batch_size=8"), "--blocks must be 0.5 or a whole number from 0 to 2"),
        ("reconstruct", ("--mask_ratio=0.99",), "--mask_ratio must keep at least one of the 16 patches"),
    ],
)
def test_bad_values(capsys, tmp_path, name, options, message):
    assert message in refused(capsys, tmp_path, *COMMANDS[name], *options)


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        ("extract", "out.csv", "OUT must end in .npy or .parquet; it is out.csv"),
        ("extract", "far/out.npy", "OUT must be a file in a folder that exists; it is far/out.npy"),
        ("reconstruct", "out.jpg", "OUT must be a .png file in a folder that exists; it is out.jpg"),
    ],
)
def test_bad_outputs(capsys, tmp_path, command, out, message):
    assert message in refused(capsys, tmp_path, command, "mae", "data", out)


def test_reconstruct_needs_a_decoder(capsys, tmp_path):
    checkpoint.convert("mae", "encoder.pth", "timm")
    line = refused(capsys, tmp_path, "reconstruct", "encoder.pth", "data", "out.png", "--num_heads=4")
    assert "CHECKPOINT must have a decoder for reconstruct; encoder.pth has none" in line


@pytest.mark.parametrize(("out", "message"), [("out.parquet", ".parquet needs pyarrow"), ("out.npy", ".npy needs numpy")])
def test_missing_packages(capsys, tmp_path, monkeypatch, out, message):
    monkeypatch.setattr("maefast.train.errors.find_spec", lambda name: None)
    assert f'{message}: pip install "maefast[eval]"' in refused(capsys, tmp_path, "extract", "mae", "data", out)
    assert "reconstruct needs matplotlib" in refused(capsys, tmp_path, *COMMANDS["reconstruct"])
