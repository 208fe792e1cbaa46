"""The main job: what it writes, what it says, and that the encoder it trains is worth having."""

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maefast import MAE, cli
from maefast.reference import ReferenceMAE
from maefast.train.baseline import normalised
from maefast.train.demo import loop
from maefast.train.demo.compare import STEPS_PER_ROUND, Comparison, compare, median_interval
from maefast.train.demo.demo import demo, run_probe, train
from maefast.train.demo.experiments import DIGITS
from maefast.train.demo.images import batches, centre_crops, digits
from maefast.train.demo.probe import MARGIN, ProbeRow, few_label_probe, table, verdict
from maefast.train.errors import UserError
from maefast.train.files import replace_file
from maefast.train.pictures import make_panel

FILES = ["checkpoint.pt", "log.jsonl", "loss.png", "reconstruction.png"]


@pytest.fixture(scope="module", autouse=True)
def _six_rounds() -> Iterator[None]:
    """A comparison ends after its first six rounds, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maefast.train.demo.compare.SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A short demo: its folder and its summary."""
    output = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return output, demo(output=output, steps=60, seed=1)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_files(run: tuple[Path, dict[str, Any]]) -> None:
    output, _ = run
    assert sorted(path.name for path in output.iterdir()) == FILES  # and no temporary file


def test_pictures(run: tuple[Path, dict[str, Any]]) -> None:
    output, _ = run
    reconstruction = pixels(output / "reconstruction.png")
    assert reconstruction.shape == (825, 1100, 3)  # two panels of 8 columns, at 110 dots an inch
    top, bottom = reconstruction[:412].astype(int), reconstruction[412:].astype(int)
    assert (top.max(axis=2) == top.min(axis=2)).all()  # digits are grey
    assert (bottom.max(axis=2) - bottom.min(axis=2)).max() > 100  # photographs are not
    assert len(np.unique(reconstruction.reshape(-1, 3), axis=0)) > 1000
    assert pixels(output / "loss.png").std() > 5


def test_checkpoint_gives_the_same_loss(run: tuple[Path, dict[str, Any]]) -> None:
    output, summary = run
    checkpoint = torch.load(output / "checkpoint.pt", weights_only=True)
    assert checkpoint["args"] == {"steps": 60, "batch_size": 64, "mask_ratio": 0.5, "lr": 0.003, "seed": 1}
    model = MAE(**checkpoint["config"])
    model.load_state_dict(checkpoint["model"], strict=True)
    data = digits(seed=1)
    images = data.images[data.held_out]
    noise = torch.rand(len(images), model.patch_embed.num_patches)
    loss = model(images, 0.5, noise=noise).loss.item()
    reference = ReferenceMAE(**{name: value for name, value in checkpoint["config"].items() if name not in ("mean", "std")})
    reference.load_state_dict(checkpoint["model"], strict=True)
    assert loss == pytest.approx(reference(normalised(images, checkpoint["config"]), 0.5, noise=noise).loss.item(), rel=1e-5)
    assert loss == pytest.approx(summary["summary"]["digits"]["loss"], rel=0.25)  # of unseen digits against the last batches


def test_log(run: tuple[Path, dict[str, Any]]) -> None:
    output, summary = run
    *records, last = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert last == json.loads(json.dumps(summary))
    digits_log = [record for record in records if record["model"] == "digits"]
    assert [record["step"] for record in digits_log] == list(range(1, 61))
    assert [record["step"] for record in records if record["model"] == "photographs"] == list(range(1, 29))  # 60 * 1200 // 2500
    assert digits_log[0]["lr"] == 0.0
    assert digits_log[6]["lr"] == pytest.approx(3e-3)  # the end of six steps of warm-up
    assert digits_log[-1]["loss"] < 0.7 * digits_log[0]["loss"]
    assert all(record["images_per_second"] > 0 for record in records)


def test_agrees_with_the_reference(run: tuple[Path, dict[str, Any]]) -> None:
    _, summary = run
    for model in summary["summary"].values():
        assert model["loss_difference"] < 1e-4
        low, high = model["ratio_interval"]
        assert 0 < low <= model["ratio_to_reference"] <= high
        assert model["ratio_rounds"] == 6


def test_same_seed_same_losses_and_weights(run: tuple[Path, dict[str, Any]]) -> None:
    output, _ = run
    again = train(DIGITS.changed(60, None, None), digits(seed=1), seed=1)
    logged = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()][:60]
    assert [record["loss"] for record in again.records] == [record["loss"] for record in logged]
    saved = torch.load(output / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in again.model.state_dict().items())


def test_pretraining_beats_raw_pixels_and_the_untrained_encoder() -> None:
    """Three blocks and 1300 steps: a lead of 3.6 and 5.6 points, in half of the demo's time."""
    trained = train(replace(DIGITS, steps=1300, lr=4e-3, config=DIGITS.config | {"depth": 3}), digits(seed=0), seed=0)
    held = run_probe(trained, seed=0)
    rows = {(row["features"], row["labels_per_class"]): row for row in trained.probe}
    assert len(rows) == 3 * 4
    names = ("pre-trained encoder", "untrained encoder", "raw pixels")
    best, untrained, raw = (rows[name, 2]["mean"] for name in names)
    assert best >= raw + 0.02
    assert best >= untrained + 0.04
    assert held is (best - max(raw, untrained) >= MARGIN)
    assert [rows["raw pixels", shot]["draws"] for shot in (2, 5, 10, None)] == [20, 20, 20, 1]
    assert min(rows[name, None]["mean"] for name in names) > 0.93


def test_probe_scores_by_hand() -> None:
    labels = torch.arange(4).repeat(10)
    features = {"told": torch.nn.functional.one_hot(labels, 4).float(), "nothing": torch.zeros(40, 3)}
    rows = few_label_probe(features, labels, torch.arange(20), torch.arange(20, 40), shots=(2, 6), draws=3)
    assert rows == [  # 6 labels are more than the 5 that a class has to train on
        ProbeRow("told", 2, 1.0, 0.0, 3),
        ProbeRow("told", None, 1.0, 0.0, 1),
        ProbeRow("nothing", 2, 0.25, 0.0, 3),
        ProbeRow("nothing", None, 0.25, 0.0, 1),
    ]
    assert table(rows).splitlines() == [
        "| features | 2 per class   | all labels |",
        "|----------|---------------|------------|",
        "| told     | 1.000 ± 0.000 | 1.000      |",
        "| nothing  | 0.250 ± 0.000 | 0.250      |",
    ]
    helped = "Pre-training helped: +75.0 points against the nothing at 2 labels per class (required: +5)."
    assert verdict(rows, "told") == (True, helped)
    held, sentence = verdict(rows, "nothing")
    assert not held
    assert sentence.startswith("Pre-training did not help enough: -75.0 points against the told")
    assert MARGIN == 0.05


def test_probe_of_many_features_is_logistic_regression_fitted_to_the_end() -> None:
    from sklearn.linear_model import LogisticRegression

    labels = torch.arange(3).repeat(40)
    features = torch.randn(120, 4000) + 0.06 * torch.randn(3, 4000)[labels]
    train, held_out = torch.arange(60), torch.arange(60, 120)
    (row,) = few_label_probe({"wide": features}, labels, train, held_out, shots=())
    centred = features - features[train].mean(dim=0)
    x = (centred / centred[train].square().mean().sqrt()).double().numpy()
    plain = LogisticRegression(max_iter=10_000, tol=1e-9).fit(x[:60], labels[:60])  # without the change of basis
    assert 0.4 < row.mean < 0.95  # else the agreement would say nothing
    assert row.mean == pytest.approx(plain.score(x[60:], labels[60:]), abs=1e-12)


def test_median_interval_by_hand() -> None:
    """No head: 6 tosses, 1/64. At most one head: 8 tosses, 9/256; 9 tosses, 10/512."""
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]) == (1.0, 8.0)  # 9/256 is more than a fortieth
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]) == (2.0, 8.0)  # 10/512 is not
    ranks = [float(rank) for rank in range(1, 101)]
    assert median_interval(ranks) == (40.0, 61.0)  # as tables of the sign test have it
    with pytest.raises(ValueError, match="6 or more for a 95 % interval; there are 5"):
        median_interval(ranks[:5])


def comparison_of(rounds: int) -> Comparison:
    stream = batches(digits(seed=0), 8, 4, torch.Generator().manual_seed(0), flip=False)
    return compare(DIGITS.config, stream, rounds=rounds, lr=1e-4, mask_ratio=0.5, seed=0)


def test_comparison_is_honest() -> None:
    def text(*ratios: float) -> str:
        return str(Comparison(8, [0.02] * len(ratios), [0.02 * ratio for ratio in ratios], 1e-7))

    speed, steady = "speed against the eager reference", "(20.0 against 30.0 ms a step of 8 images; median and its 95 % interval"
    steady += " over 6 rounds of 4 steps each; losses within 1e-07)"
    assert text(1.5, 1.52, 1.5, 1.5, 1.48, 1.5) == f"{speed} 1.50 x, 1.48 to 1.52 {steady}"
    assert text(*[0.5] * 6).startswith(f"{speed} 0.50 x, 0.50 to 0.50; maefast is SLOWER here (")
    wide = f"{speed} 0.90 x, 0.90 to 1.10; a wide interval: few rounds, or a busy machine ("
    assert text(0.9, 0.95, 0.9, 1.1, 0.9, 0.9).startswith(wide)


@pytest.mark.parametrize(
    ("speeds", "seconds", "rounds"),
    [
        ([1.1], 0.1, 6),  # settled at once
        ([0.4, 1.1, 1.1, 1.1], 0.1, 15),  # three of 15 are slow, and an interval starts at the 4th smallest
        ([0.5, 2.0], 1e-4, 40),  # never settles: as many rounds as were asked for
        ([0.5, 2.0], 0.4, 8),  # five rounds of 2.4 s, the warm-up among them, and four of 4.8 s
    ],
)
def test_comparison_ends(monkeypatch: pytest.MonkeyPatch, speeds: list[float], seconds: float, rounds: int) -> None:
    """On a clock that maefast's step moves by `seconds`, the reference's by a multiple."""
    now, calls = 0.0, 0

    def step(model: Any, *args: Any, return_pred: bool = True, **kwargs: Any) -> torch.Tensor:
        nonlocal now, calls
        round_of_step, calls = calls // (2 * STEPS_PER_ROUND), calls + 1
        now += seconds * (speeds[round_of_step % len(speeds)] if return_pred else 1.0)
        return torch.tensor(1.0)

    monkeypatch.setattr("maefast.train.demo.compare.SECONDS", 30.0)
    monkeypatch.setattr("maefast.train.demo.compare.training_step", step)
    monkeypatch.setattr("maefast.train.demo.compare.time", SimpleNamespace(perf_counter=lambda: now))
    comparison = comparison_of(40)
    assert len(comparison.ratios) == rounds
    assert comparison.ratios == pytest.approx([speeds[done % len(speeds)] for done in range(1, rounds + 1)])


def test_comparison_sees_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(MAE):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            return out._replace(loss=out.loss * 1.5)

    assert comparison_of(1).loss_difference < 1e-4
    monkeypatch.setattr("maefast.train.demo.compare.MAE", Wrong)
    assert comparison_of(1).loss_difference > 0.4


def test_panel_shows_what_the_model_saw() -> None:
    model = MAE(**DIGITS.config).eval()
    images = digits(seed=0).images[:3]
    panel = make_panel("", model, images, 0.5, seed=0)
    assert torch.equal(panel.original, images)
    hidden = panel.masked != images
    visible = (panel.masked == images) & (images != 128)
    assert panel.masked[hidden].unique().tolist() == [128]
    assert torch.equal(panel.reconstruction[visible], images[visible])
    assert (panel.reconstruction != images).float().mean() > 0.2


def save_folder(root: Path, classes: tuple[str, ...], per_class: int) -> None:
    generator = np.random.default_rng(0)
    makers: list[Callable[[np.ndarray], Image.Image]] = [
        Image.fromarray,
        lambda x: Image.fromarray(x[..., 0]),
        lambda x: Image.fromarray(x).quantize(16),
        lambda x: Image.fromarray(x).convert("RGBA"),
        lambda x: Image.fromarray(x).convert("CMYK"),
        lambda x: Image.fromarray(x[..., 0].astype(np.uint16) * 16),
    ]
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            height, width = generator.integers(40, 90, 2)
            image = makers[i % len(makers)]((generator.integers(0, 128, (height, width, 3)) + 100 * c).astype(np.uint8))
            image.save(root / name / (f"{i}.tiff" if image.mode == "CMYK" else f"{i}.png"))


def test_folder_with_classes_and_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path / "data", ("dark", "light"), 12)
    (tmp_path / "data" / "dark" / "broken.jpg").write_bytes(b"\xff\xd8 and no more")
    (tmp_path / "data" / "text.png").write_text("no image")
    arguments = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--steps", "3", "--batch_size", "4"]
    assert cli.main(["demo", *arguments]) == 0
    streams = capsys.readouterr()
    for name in (r"broken\.jpg", r"text\.png"):
        assert re.search(rf"^skipped .*{name}: .", streams.out, re.MULTILINE)
    told = ["2 unreadable files skipped\n24 images from", "20 to train on, 4 held out", "| raw pixels "]
    for text in (*told, "2 classes, 4 held-out images"):
        assert text in streams.out
    assert "images: step 3/3, loss" in streams.err  # no terminal here: plain lines
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    summary = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])
    assert [Path(path).name for path in summary["skipped"]] == ["broken.jpg", "text.png"]
    assert {row["labels_per_class"] for row in summary["probe"]} == {2, 5, 10, None}
    assert pixels(tmp_path / "out" / "reconstruction.png").shape[0] == 412  # one panel


def test_folder_without_classes_skips_the_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_folder(tmp_path, (".",), 6)
    summary = demo(data=tmp_path, output=tmp_path / "out", steps=2, batch_size=2)
    assert "no few-label probe: it needs two or more class folders" in capsys.readouterr().out
    assert (summary["probe"], summary["probe_held"]) == ([], None)
    assert demo(data=tmp_path, output=tmp_path / "out", steps=1, batch_size=2)["skipped"] == []
    assert "\n6 images from" in "\n" + capsys.readouterr().out  # the first run's pictures are no data


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    def write_half(path: Path) -> None:
        with replace_file(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError("half-way")

    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half-way"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = MAE(**DIGITS.config)
    torch.nn.init.constant_(model.decoder_pred.bias, float("nan"))
    images = iter([digits(seed=0).images[:2]] * 2)
    with pytest.raises(UserError, match="the loss of digits is nan at step 1"):
        loop.train_loop(model, images, title="digits", steps=1, lr=1e-3, mask_ratio=0.5)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    stream = batches(digits(seed=0), 8, 16, torch.Generator().manual_seed(0), flip=False)
    loop.train_loop(MAE(**DIGITS.config), stream, title="digits", steps=20, lr=1e-3, mask_ratio=0.5)
    last = terminal.getvalue().rstrip().split("\r")[-1]
    assert re.search(r"digits: 100%.* 320/320 \[\d\d:\d\d<00:00, .* images/s, loss=\d\.\d{4}\]", last), last
    assert "step" not in last


def test_pictures_come_from_the_centre() -> None:
    assert centre_crops(torch.arange(25).reshape(1, 1, 5, 5), 3).flatten().tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]
