"""The table of measurements and what writes it, with timers that are passed in."""

import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maefast import gemm, kernels, ops, request, tuned
from maefast.blocks import Block
from maefast.kernels import tune
from maefast.kernels.tune import attention, products, repeated, tiles, timed
from maefast.kernels.tune.products import Size
from maefast.ops import _tokens
from maefast.tuned import Attention, Gemm, Repeated, Table, Tile

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "h200"
CPU, BF16 = torch.device("cpu"), torch.bfloat16
needs_triton = pytest.mark.skipif(not kernels.HAS_TRITON, reason="Triton is not installed")


def tried_for(entry: Tile) -> tuple[dict[str, int], ...]:
    """The tiles that tune tries for the kernel of an entry."""
    of_attention = (
        attention.candidates(direction, T, d)
        for T, _, d in attention.SHAPES
        for direction in ("fwd", "bwd")
        if (tuned.attention_kernel(direction, d, T), d) == (entry.kernel, entry.width)
    )
    return tiles.CANDIDATES[entry.kernel] if entry.kernel in tiles.CANDIDATES else next(of_attention)


def test_the_committed_table_is_what_tune_would_write():
    """By the speedups in it: which lengths an entry covers, and what is worth one."""
    table = tuned.read()
    for capability, measured in {(entry.capability, entry.measured) for entry in table.attention}:
        entries = [entry for entry in table.attention if (entry.capability, entry.measured) == (capability, measured)]
        rows = []
        for entry, (T, _, d) in itertools.product(entries, dict.fromkeys(attention.SHAPES)):
            if d == entry.head_width and entry.first <= T <= entry.last:
                rows.append((T, d, {entry.backend: 1.0, "sdpa": entry.speedup + 0.001}))
        assert sorted(attention.attention_entries(rows, capability, measured)) == sorted(entries)
    for entry in table.tiles:
        assert entry.speedup >= timed.GAIN
        assert entry.tile in tried_for(entry)


def test_the_committed_products_follow_from_the_results():
    results = json.loads((RESULTS / "gemm.json").read_text())
    rows = [(row["kind"], Size(row["rows"], row["depth"], row["features"]), row["ms"]) for row in results["timing"]]
    measured = f"{results['device']}, torch {results['torch']}, a prototype"
    assert sorted(products.product_entries(rows, "9.0", measured)) == sorted(tuned.read().gemm)


def test_the_table_is_written_as_it_is_committed(tmp_path):
    tuned.write(tuned.read(), tmp_path / "table.json")
    assert (tmp_path / "table.json").read_text() == tuned.TABLE.read_text()


def test_entries_are_sorted_one_a_line(tmp_path):
    tiles = tuple(Tile(c, k, w, {"num_warps": 2}, 1.2, "x") for c, k, w in (("10.0", "b", 1), ("9.0", "b", 2), ("9.0", "a", 9)))
    gemm = tuple(Gemm("9.0", kind, (1, 8), (2, 16), 5, 1.2, "x") for kind in ("linear", "input_gradient"))
    repeated = (Repeated("9.0", 512, 1000, 1.1, "x"),)
    table = Table((Attention("8.0", 64, 34, 50, "flash_attn", 1.1, "x"),), tiles, gemm, repeated)
    tuned.write(table, tmp_path / "table.json")
    assert tuned.read(tmp_path / "table.json") == Table(table.attention, (tiles[2], tiles[1], tiles[0]), gemm[::-1], repeated)
    assert len((tmp_path / "table.json").read_text().splitlines()) == 2 + 3 + 5 + 4 + 3


def test_which_backend_is_worth_an_entry():
    def entries(*rows: tuple[int, int, dict[str, float]]) -> list[tuple[object, ...]]:
        return [entry[1:6] for entry in attention.attention_entries(rows, "9.0", "here")]

    assert entries((50, 64, {"native": 10.0, "sdpa": 10.4})) == [], "4 % is noise"
    assert entries((50, 64, {"native": 10.0, "sdpa": 15.0})) == [(64, 34, 56, "native", 1.5)]
    assert entries((50, 64, {"native": 10.0, "sdpa": 15.0}), (50, 64, {"native": 10.0, "sdpa": 9.0})) == [], "the least counts"
    assert entries((50, 64, {"native": 10.0, "flash_attn": 8.0, "sdpa": 15.0})) == [(64, 34, 50, "flash_attn", 1.87)]
    assert entries((50, 64, {"sdpa": 15.0})) == []
    assert entries((65, 80, {"native": 10.0, "sdpa": 15.0})) == [(80, 65, 72, "native", 1.5)], "44 is in another tile"
    both = {"flash_attn": 1.0, "sdpa": 2.0}
    assert entries((257, 32, both), (197, 32, both)) == [(32, 132, 197, "flash_attn", 2.0), (32, 198, 257, "flash_attn", 2.0)]


def test_which_tile_is_worth_an_entry():
    first, second = tiles.CANDIDATES["layer_norm_fwd"][:2]
    names = tiles.label(first), tiles.label(second)

    def entries(times: dict[str, float]) -> list[Tile]:
        return tiles.tile_entries([("layer_norm_fwd", 512, times)], "9.0", "here")

    (entry,) = entries({"rule": 3.0, names[0]: 2.5, names[1]: 2.0})
    assert entry == Tile("9.0", "layer_norm_fwd", 512, second, 1.5, "here")
    assert entries({"rule": 3.0, names[0]: 2.9}) == []
    assert entries({"rule": 3.0, names[0]: 3.1}) == []
    assert entries({names[0]: 3.1}) == [], "nothing to compare with"


def test_the_tiles_of_attention_that_are_tried():
    """Every other line of attention_tiles.inc that takes the rows of ViT-B, -L or -H."""
    lines = tuned.fitting_tiles("fwd", 32, 208)
    assert len(lines) > 3
    assert all(line["head_width"] == 32 and line["tokens"] >= 208 for line in lines)
    assert attention.candidates("fwd", 197, 32) == tuple({"tile": i} for i in range(1, len(lines)))
    short = tuned.fitting_tiles("fwd", 64, 56)
    assert {short[tile["tile"]]["tokens"] for tile in attention.candidates("fwd", 50, 64)} == {56, 64, 80}, "not 208"
    assert all(short[tile["tile"]]["shared"] <= 40_000 for tile in attention.candidates("fwd", 50, 64, 40_000))
    assert len(attention.candidates("fwd", 50, 64, 40_000)) < len(attention.candidates("fwd", 50, 64))
    shapes = {(T, d) for T, _, d in attention.SHAPES}
    assert len({(tuned.attention_kernel("fwd", d, T), d) for T, d in shapes}) == len(shapes), "each has a kernel of its own"


def test_tiles_of_attention_that_were_measured(monkeypatch):
    """A tile counts by the row where it gains least; other kernels keep their entries."""
    rows = {12: {"rule": 2.0, "tile=1": 1.0, "tile=2": 1.5}, 16: {"rule": 4.0, "tile=1": 3.9, "tile=2": 3.2}}

    def timed(shape, setting):
        yield from [("attention_56_fwd", 64, rows[shape[1]])] if shape[2] == 64 else []

    monkeypatch.setattr(tune, "time_attention", lambda shape, setting: {"native": 3.0, "sdpa": 3.0})
    monkeypatch.setattr(tune, "time_attention_tiles", timed)
    old = OLD._replace(tiles=tuple(Tile(c, "attention_56_fwd", 64, {"tile": 1}, 1.1, "before") for c in ("8.0", "9.0")))
    new = tune.tuned_table(("attention",), old, setting({}), "9.0", "here")
    assert new.tiles == (old.tiles[0], Tile("9.0", "attention_56_fwd", 64, {"tile": 2}, 1.25, "here"))


class Tiles(TorchDispatchMode):
    """Notes the tile that a call of attention asks for; the CPU, which has none, is not told."""

    def __init__(self):
        super().__init__()
        self.asked = set[tuple[str, int]]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.startswith("maefast::attention") and len(args) == len(func._schema.arguments):
            self.asked.add((func._schema.name[-3:], args[-1]))
            args = args[:-1]
        return func(*args, **(kwargs or {}))


def test_the_tiles_of_attention_are_timed_by_direction(native, monkeypatch):
    monkeypatch.setattr(sys.modules["maefast.ops.attention"], "_TILED", "cpu")
    labels = ("rule", *(f"tile={i}" for i in range(1, 20)))
    with Tiles() as tiles:
        rows = list(attention.time_attention_tiles((56, 2, 64), setting(dict.fromkeys(labels, 1.0))))
    counts = {direction: 1 + len(attention.candidates(direction, 56, 64)) for direction in ("fwd", "bwd")}
    expected = [(f"attention_56_{direction}", 64, dict.fromkeys(labels[:count], 1.0)) for direction, count in counts.items()]
    assert rows == expected
    assert tiles.asked == {(direction, tile) for direction, count in counts.items() for tile in range(1, count)}


def test_attention_takes_the_tile_of_the_table(native, monkeypatch):
    """In the op and in the block, by direction and length, but not in an exported graph."""
    from maefast import _torch

    monkeypatch.setattr(sys.modules["maefast.ops.attention"], "_TILED", "cpu")
    block, x = Block(64, 2, 4.0, torch.nn.LayerNorm), torch.randn(2, 150, 64)

    def asked() -> set[tuple[str, int]]:
        with Tiles() as tiles:
            ops.attention(torch.randn(2, 150, 192, requires_grad=True), 2, backend="native").sum().backward()
            block(x).sum().backward()
        return tiles.asked

    with tuned.trying("attention_208_fwd", 32, CPU, {"tile": 3}), tuned.trying("attention_208_bwd", 32, CPU, {"tile": 2}):
        assert asked() == {("fwd", 3), ("bwd", 2)}
        monkeypatch.setattr(_torch, "is_exporting", lambda: True)
        assert asked() == set()
    with tuned.trying("attention_288_fwd", 32, CPU, {"tile": 1}):
        assert asked() == set()


def test_which_product_is_worth_an_entry():
    def entries(*rows: tuple[str, tuple[int, int, int], float]) -> list[tuple[object, ...]]:
        timed = [(kind, Size(*size), {"cublas": speedup, "cutlass": 1.0}) for kind, size, speedup in rows]
        return [entry[1:6] for entry in products.product_entries(timed, "9.0", "here")]

    assert entries(("linear", (900, 60, 30), 1.04)) == [], "4 % is noise"
    assert entries(("linear", (900, 60, 30), 1.229)) == [("linear", (40, 60), (20, 30), 600, 1.22)]
    wide = ("linear", (900, 60, 30), 1.2), ("linear", (600, 60, 24), 1.0), ("linear", (900, 50, 30), 1.2)
    expected = [("linear", (51, 60), (25, 30), 400, 1.2), ("linear", (34, 50), (20, 30), 400, 1.2)]
    assert entries(*wide) == expected, "a range ends where another was measured"
    others = ("linear", (900, 60, 30), 1.2), ("input_gradient", (30, 60, 24), 2.0)
    assert entries(*others)[0] == ("linear", (40, 60), (20, 30), 600, 1.2), "each kind by itself"
    assert products.product_entries([("linear", Size(900, 60, 30), {})], "9.0", "here") == (), "it could not run"


def test_when_repeated_tokens_are_worth_an_entry():
    def entries(*speedups: float) -> tuple[Repeated, ...]:
        timed = [(repeated.Size(12 * i, 3 * i, 8, 2), 10, {"each": s, "once": 1.0}) for i, s in enumerate(speedups, 1)]
        return repeated.repeated_entry(timed, "9.0", "here")

    assert entries(1.04) == (), "4 % is noise"
    values = (10 * 9 - 13) * 8  # of the smallest
    assert entries(1.239, 1.3) == (Repeated("9.0", 8, 2 * values // 3, 1.23, "here"),)
    assert entries(1.3, 1.04) == (), "the least counts"
    wrong = [(repeated.SIZES[0], 10, {"each": 2.0})]
    assert repeated.repeated_entry(wrong, "9.0", "here") == ()


def test_repeated_tokens_on_a_gpu_follow_the_table(monkeypatch):
    class OnGpu:
        device, shape = torch.device("cuda"), (10, 13, 8)

    monkeypatch.setattr(_tokens.gpu, "capability", lambda device: (9, 0))
    for entry, enough in ((("9.0", 8, 616), True), (("9.0", 8, 617), False), (("9.0", 16, 616), False), (("8.0", 8, 616), False)):
        monkeypatch.setattr(tuned, "_committed", Table((), (), (), (Repeated(*entry, 1.1, "here"),)))
        assert _tokens.repeats_enough(OnGpu, len_keep=3) == enough


@pytest.mark.parametrize("kind", gemm.KINDS)
def test_what_is_timed_of_a_product(kind, monkeypatch):
    """Contenders give what the plain ops give within bf16; float64 stands in for the kernels."""

    def stand_in(kind, factor=1):
        def run(*given):
            results = products.plain(kind, *(t.double() for t in given))
            return tuple(factor * t.to(torch.float32 if t.dim() == 1 else BF16) for t in results)

        return run

    monkeypatch.setattr(gemm, "why_not", lambda *_: None)
    monkeypatch.setitem(products._CUTLASS, kind, stand_in(kind))
    monkeypatch.setitem(products._CUBLAS, "linear_gelu_bwd_sum", stand_in("linear_gelu_bwd_sum"))
    ran = {}

    def rotate(runs, sets):
        for name, run in runs.items():
            ran[name] = [run(i) for i in range(sets)]
        return dict.fromkeys(runs, 1.0)

    size = Size(24, 16, 32)
    assert products.time_product(kind, size, timed.Setting(rotate, CPU, half=BF16)) == {"cublas": 1.0, "cutlass": 1.0}
    torch.testing.assert_close(ran["cublas"], ran["cutlass"], rtol=0.05, atol=0.05, check_dtype=False)
    assert not torch.equal(ran["cublas"][0][0], ran["cublas"][1][0]), "the sets differ"
    monkeypatch.setitem(products._CUTLASS, kind, stand_in(kind, factor=2))
    assert products.time_product(kind, size, timed.Setting(rotate, CPU, half=BF16)) == {}, "wrong results are not timed"


def setting(times: dict[str, float]) -> timed.Setting:
    """On the CPU; whatever is to be timed runs once, and takes `times`."""

    def rotate(runs, sets):
        for run in runs.values():
            for i in range(sets):
                run(i)
        return {name: times[name] for name in runs}

    return timed.Setting(rotate, CPU, batch=2)


def test_attention_is_timed_on_all_that_can_run(native, capsys):
    timed = attention.time_attention((5, 2, 8), setting({"native": 1.0, "sdpa": 2.0}))
    assert timed == {"native": 1.0, "sdpa": 2.0}
    assert re.fullmatch("attention of 5 tokens, heads 8 wide, without flash_attn: .*flash-attn.*\n", capsys.readouterr().out)


def test_attention_with_wrong_results_is_not_timed(native, monkeypatch, capsys):
    right = ops.attention

    def wrong(qkv, num_heads):
        return right(qkv, num_heads) * (1.02 if request.requested() == "native" else 1)

    monkeypatch.setattr(ops, "attention", wrong)
    assert attention.time_attention((5, 2, 8), setting({"sdpa": 2.0})) == {"sdpa": 2.0}
    assert "without native: its results are outside the error rule" in capsys.readouterr().out


def test_the_first_block_is_timed_in_both_ways(native, monkeypatch, capsys):
    size, times = repeated.Size(12, 3, 32, 2), {"each": 2.0, "once": 1.0}
    given: list[int] = []
    summed = _tokens.RepeatedTokens.summed
    monkeypatch.setattr(_tokens.RepeatedTokens, "summed", lambda self, dy: given.append(len(dy)) or summed(self, dy))
    assert repeated.time_repeated(size, setting(times)) == times
    assert given == [2] * 3, "checked once, then each set"
    monkeypatch.setattr(_tokens.RepeatedTokens, "summed", lambda self, dy: 1.1 * summed(self, dy))
    assert repeated.time_repeated(size, setting(times)) == {"each": 2.0}
    assert "its results are outside the error rule" in capsys.readouterr().out


def test_the_error_rule():
    exact = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    eager, eps = (exact + torch.tensor([0.01, 0, 0])).float(), torch.finfo(torch.float32).eps
    assert timed.is_right([eager], [eager], [exact])
    assert timed.is_right([(exact + torch.tensor([0, 0.019, 0])).float()], [eager], [exact])
    assert not timed.is_right([(exact + torch.tensor([0, 0.021, 0])).float()], [eager], [exact])
    assert not timed.is_right([eager * torch.nan], [eager], [exact])
    assert timed.is_right([exact.float() * (1 + eps / 2)], [exact.float()], [exact])


ON_NATIVE = tuple(Attention(capability, 64, 34, 56, "native", 2.0, "before") for capability in ("8.0", "9.0"))
TILES = {"layer_norm_fwd": {"num_warps": 8}, "unshuffle_fwd": {"ROWS": 4}}
OLD = Table(
    (*ON_NATIVE, Attention("9.0", 32, 100, 150, "flash_attn", 2.0, "before")),
    tuple(Tile("9.0", kernel, 512, tile, 1.1, "before") for kernel, tile in TILES.items()),
    tuple(Gemm("9.0", kind, (342, 512), (1366, 2048), 11094, 1.2, "before") for kind in ("linear", "input_gradient")),
    tuple(Repeated(capability, 512, 1000, 1.2, "before") for capability in ("8.0", "9.0")),
)


def test_what_was_measured_takes_the_place_of_what_was(monkeypatch):
    """Parts and backends of this architecture that were timed; flash-attn keeps its entry."""
    native = {50: 3.0, 65: 1.0, 197: 1.0, 257: 4.0}
    monkeypatch.setattr(tune, "time_attention", lambda shape, setting: {"native": native[shape[0]], "sdpa": 3.0})
    monkeypatch.setattr(tune, "time_attention_tiles", lambda shape, setting: [])
    monkeypatch.setattr(tune, "time_tiles", lambda op, setting: [(f"{op}_fwd", 768, {"rule": 2.0, "ROWS=1 num_warps=2": 1.0})])
    new = tune.tuned_table(("attention", "layer_norm"), OLD, setting({}), "9.0", "here")
    measured = [Attention("9.0", d, first, last, "native", 3.0, "here") for d, first, last in ((64, 132, 208), (80, 65, 72))]
    assert new.attention == (OLD.attention[0], OLD.attention[2], *measured)
    assert new.tiles == (OLD.tiles[1], Tile("9.0", "layer_norm_fwd", 768, {"ROWS": 1, "num_warps": 2}, 2.0, "here"))
    assert [line[0] for line in tune.changes(OLD, new)] == ["-", "-", "+", "+", "+"]
    assert tune.changes(OLD, OLD) == []
    assert (new.gemm, new.repeated) == (OLD.gemm, OLD.repeated)
    elsewhere = tune.tuned_table(("add_layer_norm",), OLD, setting({}), "8.0", "here")
    assert elsewhere.attention == OLD.attention
    assert elsewhere.tiles[:2] == OLD.tiles


def test_products_that_were_measured(monkeypatch):
    """A kind of which nothing could run keeps its entries."""

    def timed(kind, size, *_):
        return {"cublas": 2.0, "cutlass": 1.0} if (kind, size.depth, size.features) == ("linear", 512, 2048) else {}

    monkeypatch.setattr(tune, "time_product", timed)
    new = tune.tuned_table(("gemm",), OLD, setting({}), "9.0", "here")
    assert new.gemm == (OLD.gemm[1], Gemm("9.0", "linear", (342, 512), (1366, 2048), 134485, 2.0, "here"))
    assert (new.attention, new.tiles) == (OLD.attention, OLD.tiles)


def test_repeated_tokens_that_were_measured(monkeypatch):
    monkeypatch.setattr(tune, "time_repeated", lambda size, setting: {"each": 1.5, "once": 1.0})
    new = tune.tuned_table(("repeated_tokens",), OLD, setting({}), "9.0", "here")
    values = (2 * 147 - 197) * 512
    assert new == OLD._replace(repeated=(OLD.repeated[0], Repeated("9.0", 512, 2 * values // 3, 1.5, "here")))
    monkeypatch.setattr(tune, "time_repeated", lambda size, setting: {"each": 1.0, "once": 1.0})
    assert tune.tuned_table(("repeated_tokens",), OLD, setting({}), "9.0", "here").repeated == OLD.repeated[:1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, capsys):
    assert tune.main(["--output", str(tmp_path / "table.json")]) == 2
    assert capsys.readouterr() == ("", f"python -m maefast.kernels.tune needs a GPU, torch {torch.__version__} finds none\n")
    assert not (tmp_path / "table.json").exists()
    with pytest.raises(SystemExit) as stop:
        tune.main(["--only", "attention,linear"])
    assert stop.value.code == 2
    assert "argument --only: must be of attention, gemm, repeated_tokens, add_layer_norm" in capsys.readouterr().err


def test_a_run_on_a_gpu_in_name_only(tmp_path, monkeypatch, capsys):
    """The command from end to end, but for the timing."""
    for name, value in {"is_available": True, "current_device": 0, "get_device_name": "NVIDIA X"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(tuned, "architecture", lambda device: "8.0")
    monkeypatch.setattr(tune, "medians_on", lambda device: None)
    times = {"native": 1.0, "sdpa": 1.5}
    monkeypatch.setattr(tune, "time_attention", lambda shape, setting: times if shape[2] == 80 else {"sdpa": 1.0})
    monkeypatch.setattr(tune, "time_attention_tiles", lambda shape, setting: [])
    before = tuned.TABLE.read_text()
    assert tune.main(["--only", "attention", "--output", str(tmp_path / "table.json")]) == 0
    new = Attention("8.0", 80, 65, 72, "native", 1.5, f"NVIDIA X, torch {torch.__version__}")
    assert capsys.readouterr().out == f"+ {new}\n"
    assert tuned.read(tmp_path / "table.json").attention == (new, *tuned.read().attention)
    assert tuned.TABLE.read_text() == before


def test_it_is_a_command():
    command = [sys.executable, "-W", "ignore", "-m", "maefast.kernels.tune", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--only PARTS" in done.stdout


def launches(kernel: str) -> list:
    """Return the launches of `kernel` at a width of 512, or at P = 768."""
    import aot

    module = importlib.import_module(f"maefast.kernels.{kernel[:-4]}")
    rows, weight = torch.empty(4, 512, dtype=torch.bfloat16), torch.empty(512)
    statistics, imgs, ids = torch.empty(4), torch.empty(2, 3, 32, 32), torch.zeros(2, 4, dtype=torch.int64)
    pred, tokens = torch.empty(2, 4, 768, dtype=torch.bfloat16), torch.empty(2, 5, 512, dtype=torch.bfloat16)
    arguments = {
        "gather_patches_fwd": (imgs, ids, 16, 16, None, None, torch.bfloat16),
        "unshuffle_fwd": (tokens[:, :2], ids, torch.empty(1, 1, 512), torch.empty(1, 5, 512)),
        "unshuffle_bwd": (tokens, ids, 1, torch.bfloat16),
        "masked_mse_fwd": (pred, imgs, torch.empty(2, 4), 16, 16, True, None, None),
        "masked_mse_bwd": (torch.empty(()), pred, imgs, torch.empty(2, 4), 16, 16, True, None, None),
        "layer_norm_fwd": (rows, weight, weight, 1e-6, torch.bfloat16),
        "layer_norm_bwd": (rows, None, rows, weight, weight, statistics, statistics, None, None),
        "add_layer_norm_fwd": (rows, rows, weight, weight, 1e-6, torch.bfloat16),
        "bias_gelu_fwd": (rows, weight),
        "bias_gelu_bwd": (rows, rows, weight, False),
    }
    with aot.recorded(module) as found:
        getattr(module, kernel)(*arguments[kernel])
    return [launch for launch in found if launch.kernel.fn.__name__ == f"_{kernel}_kernel"]


def width_of(kernel: str) -> int:
    return 768 if kernel[:-4] in ("gather_patches", "masked_mse") else 512


def taken(kernel: str, names: set[str]) -> dict[str, int]:
    """The tile that a launch takes: its options, and the constants of that name."""
    (launch,) = launches(kernel)
    values = dict(zip((p.name for p in launch.kernel.params), launch.args, strict=True)) | launch.options
    return {name: values[name] for name in names - {"PROGRAMS"}}


@needs_triton
@pytest.mark.parametrize("kernel", tiles.CANDIDATES)
def test_a_launcher_reads_the_table(kernel, monkeypatch):
    width = width_of(kernel)
    for tile in tiles.CANDIDATES[kernel]:
        rule = taken(kernel, set(tile))
        with tuned.trying(kernel, width, CPU, tile):
            assert taken(kernel, set(tile)) == {name: value for name, value in tile.items() if name != "PROGRAMS"}
        with tuned.trying(kernel, width + 1, CPU, tile), tuned.trying("other", width, CPU, tile):
            assert taken(kernel, set(tile)) == rule
        assert taken(kernel, set(tile)) == rule
    monkeypatch.setattr(tuned, "_tiles", {(kernel, width, "9.0"): {"num_warps": 8}})
    monkeypatch.setattr(tuned, "_tuned", {(kernel, width)})
    monkeypatch.setattr(tuned.gpu, "capability", lambda device: (9, 0))
    on_gpu = tuned.tile_for(kernel, width, torch.device("cuda"), {"ROWS": 1, "num_warps": 1})
    assert on_gpu == {"ROWS": 1, "num_warps": 8}


@needs_triton
def test_programs_of_the_backward_norm(monkeypatch):
    """They take chunks of whole tiles, of at least four rows."""
    import aot

    from maefast.kernels import layer_norm

    rows, weight, statistics = torch.empty(70, 512), torch.empty(512), torch.empty(70)
    for programs, chunk in ((7, 10), (6, 12), (528, 4)):
        with tuned.trying("layer_norm_bwd", 512, CPU, {"ROWS": 2, "PROGRAMS": programs}), aot.recorded(layer_norm) as found:
            layer_norm.layer_norm_bwd(rows, None, rows, weight, weight, statistics, statistics, None, None)
        names = [p.name for p in found[0].kernel.params]
        assert found[0].args[names.index("chunk")] == chunk


@needs_triton
def test_every_kernel_with_a_choice_is_tuned():
    assert {kernel[:-4] for kernel in tiles.CANDIDATES} == kernels.OPS - {"random_masking"}


@needs_triton
@pytest.mark.parametrize(("kernel", "candidate"), [("bias_gelu_bwd", -1), ("layer_norm_bwd", 0)])
def test_a_candidate_compiles(kernel, candidate, tmp_path):
    import aot

    with tuned.trying(kernel, width_of(kernel), CPU, tiles.CANDIDATES[kernel][candidate]):
        (launch,) = launches(kernel)
    usage = aot.compiled(launch, 90, tmp_path)
    assert usage.warps == tiles.CANDIDATES[kernel][candidate]["num_warps"]
    assert usage.stack == 0
