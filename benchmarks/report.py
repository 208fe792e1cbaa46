"""Write a Markdown table and a bar chart of pytest-benchmark's JSON under results/<machine>/.

`python benchmarks/report.py bench.json [more.json ...] [--out DIR]` writes <size>.json, <size>.md
and <size>.png, where size is quick or full, and <size>-step.png if there are training steps.
Several files must come from one machine. A group in a later file replaces that of an earlier one.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Bench = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
FIGURES = {  # column -> key in extra_info, format, scale
    "x eager": ("x_eager", "{:.2f}", 1),
    "x compiled": ("x_compiled", "{:.2f}", 1),
    "GB/s": ("gb_per_s", "{:.1f}", 1),
    "of copy": ("copy_fraction", "{:.0f} %", 100),
    "TFLOP/s": ("tflop_per_s", "{:.3g}", 1),
    "of GEMM": ("gemm_fraction", "{:.0f} %", 100),
    "of nominal": ("nominal_fraction", "{:.0f} %", 100),
    "images/s": ("images_per_s", "{:.1f}", 1),
    "peak memory": ("peak_memory_mb", "{:.0f} MB", 1),
}
COMPUTE = ("TFLOP/s", "of GEMM", "of nominal")  # columns that are empty for an op with a byte count
COLUMNS = ("contender", "median", "IQR", *FIGURES)
COLOURS = {"maefast": "#1f77b4", "reference": "#8c8c8c"}
OTHER = "#d9a441"


def write_rows(name: str, info: dict[str, Any], rows: list[dict[str, Any]], out: Path | None) -> Path:
    """Write the rows of a script to `out` or results/<machine>/<name>.json, and return the file."""
    out = out or RESULTS / info["machine"] / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine_info": info, "rows": rows}, indent=1) + "\n")
    return out


def seconds(value: float) -> str:
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)) if value >= s or u == "ns")
    return f"{value / scale:.3g} {unit}"


def grouped(results: dict[str, Any]) -> dict[str, list[Bench]]:
    """Return the benchmarks by group, in the order of their runs."""
    groups: dict[str, list[Bench]] = {}
    for bench in results["benchmarks"]:
        groups.setdefault(bench["group"], []).append(bench)
    return groups


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge runs, the last of each group. Raises ValueError if they come from several machines."""

    def comparable(run: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in run["machine_info"].items() if key not in ("commit", "maefast")}

    groups: dict[str, list[Bench]] = {}
    for run in runs:
        if comparable(run) != comparable(runs[-1]):
            raise ValueError(f"runs of one machine and size are wanted; they are of {comparable(runs[-1])} and {comparable(run)}")
        groups |= grouped(run)
    return runs[-1] | {"benchmarks": [bench for benches in groups.values() for bench in benches]}


def row(bench: Bench) -> list[str]:
    info, stats = bench["extra_info"], bench["stats"]

    def figure(column: str, key: str, form: str, scale: float) -> str:
        return "" if key not in info or ("bytes" in info and column in COMPUTE) else form.format(info[key] * scale)

    name = info["contender"] + (" (*)" if "outside_error_rule" in info else "")
    return [name, seconds(stats["median"]), seconds(stats["iqr"]), *(figure(column, *shape) for column, shape in FIGURES.items())]


def markdown_table(lines: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in lines]


def table(benches: list[Bench]) -> list[str]:
    """Return a Markdown table without empty columns."""
    columns = [column for column in zip(COLUMNS, *map(row, benches), strict=True) if any(column[1:])]
    header, *rows = map(list, zip(*columns, strict=True))
    return markdown_table([header, ["---", *["---:"] * (len(header) - 1)], *rows])


def machine_rate(info: dict[str, Any]) -> str:
    if "bytes" in info:
        return f"{info['bytes'] / 1e6:.1f} MB must be touched; a large copy ran at {info['copy_gb_per_s']:.1f} GB/s."
    rate = info.get("why_no_gemm") or f"a matmul ran at {info['gemm_tflop_per_s']:.3g} TFLOP/s"
    return f"{info['flops'] / 1e9:.1f} GFLOP; {rate}."


def markdown(results: dict[str, Any]) -> str:
    machine = results["machine_info"]
    lines = [
        f"# Benchmarks, {machine['size']} sizes, on {machine['machine']}",
        "",
        f"{machine['device']}, {machine['threads']} threads, {machine['system']}, Python {machine['python']}, "
        f"torch {machine['torch']}, maefast {machine['maefast']}. The commit stands with each group.",
        "",
        "Contenders of a group were timed in rotation; `x eager` and `x compiled` compare medians with the group's reference, "
        "below 1 is slower. GB/s counts the bytes that must be touched, `of copy` and `of GEMM` are fractions of the rates that "
        "a large copy and a matmul reached in the same rotation, `of nominal` of what a GPU's maker states for matrix products. "
        "Peak memory is above the baseline of a fresh process; of a step on a GPU it is what torch allocates: weights, moments, "
        "a batch and what the step adds.",
    ]
    remarks = []
    for group, benches in grouped(results).items():
        info = benches[0]["extra_info"]
        lines += ["", f"## {group}", "", f"{machine_rate(info)} Commit {info['commit']}.", "", *table(benches)]
        remarks += [b["extra_info"]["outside_error_rule"] for b in benches if "outside_error_rule" in b["extra_info"]]
    if remarks:
        heading = "(*) Less exact than the error rule allows, in code that is not maefast's:"
        lines += ["", heading, "", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines) + "\n"


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw a panel for each group: every contender's speed against the reference, and its time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = grouped(results)
    rows, columns = -(-len(groups) // 3), min(3, len(groups))
    figure, axes = plt.subplots(rows, columns, figsize=(5.2 * columns, 0.7 + 2.3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(groups) :]:
        axis.set_axis_off()
    for axis, (group, benches) in zip(axes.flat, groups.items(), strict=False):
        names = [bench["extra_info"]["contender"] for bench in benches]
        speeds = [bench["extra_info"]["x_eager"] for bench in benches]
        bars = axis.barh(names, speeds, color=[COLOURS.get(name.split("-")[0], OTHER) for name in names])
        labels = [f"{x:.2f} x, {seconds(bench['stats']['median'])}" for x, bench in zip(speeds, benches, strict=True)]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xlim(0, max(speeds) * 1.45)
        axis.invert_yaxis()
        axis.set_title(group, fontsize=10)
        axis.tick_params(labelsize=8)
    machine = results["machine_info"]
    figure.suptitle(f"Speed against the eager reference\n{machine['machine']}, {machine['size']} sizes", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(results: dict[str, Any], out: Path) -> list[Path]:
    """Write the files of a run and return their paths."""
    if not results["benchmarks"]:
        raise ValueError("the JSON holds no benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"{results['machine_info']['size']}{end}" for end in (".json", ".md", ".png", "-step.png")]
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    files[1].write_text(markdown(results))
    chart(results, files[2])
    steps = [bench for bench in results["benchmarks"] if bench["group"].startswith("step-")]
    if not steps:
        return files[:3]
    chart(results | {"benchmarks": steps}, files[3])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="instead of benchmarks/results/<machine>")
    args = parser.parse_args()
    results = merged([json.loads(path.read_text()) for path in args.json])
    for path in write(results, args.out or RESULTS / results["machine_info"]["machine"]):
        print(path)


if __name__ == "__main__":
    main()
