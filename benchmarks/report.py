"""Write a Markdown table and a bar chart of pytest-benchmark's JSON under results/<machine>/. Slower
contenders are shown as well.

`python benchmarks/report.py bench.json [more.json ...] [--out DIR]` writes <size>.json, <size>.md
and <size>.png, where size is quick or full, and <size>-step.png with the training steps where there
are any. Several files must come from one machine; a group in a later file replaces the same group
in an earlier one.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Bench = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
TIME = ("contender", "median", "IQR", "x eager", "x compiled")
COLUMNS = (*TIME, "GB/s", "of copy", "TFLOP/s", "of GEMM", "of nominal", "images/s", "peak memory")
COLOURS = {"maefast": "#1f77b4", "reference": "#8c8c8c"}
OTHER = "#d9a441"


def write_rows(name: str, info: dict[str, Any], rows: list[dict[str, Any]], out: Path | None) -> Path:
    """Write the rows of a benchmark script to `out` or results/<machine>/<name>.json; return the
    file."""
    out = out or RESULTS / info["machine"] / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine_info": info, "rows": rows}, indent=1) + "\n")
    return out


def seconds(value: float) -> str:
    unit, scale = next((u, s) for u, s in (("s", 1), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)) if value >= s or u == "ns")
    return f"{value / scale:.3g} {unit}"


def grouped(results: dict[str, Any]) -> dict[str, list[Bench]]:
    """Return the benchmarks by group, in the order in which they ran."""
    groups: dict[str, list[Bench]] = {}
    for bench in results["benchmarks"]:
        groups.setdefault(bench["group"], []).append(bench)
    return groups


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge runs from one machine; of each group the last run counts. Raises ValueError for several
    machines."""

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

    def figure(key: str, form: str, scale: float = 1) -> str:
        return form.format(info[key] * scale) if key in info else ""

    return [
        info["contender"] + (" (*)" if "outside_error_rule" in info else ""),
        seconds(stats["median"]),
        seconds(stats["iqr"]),
        figure("x_eager", "{:.2f}"),
        figure("x_compiled", "{:.2f}"),
        figure("gb_per_s", "{:.1f}"),
        figure("copy_fraction", "{:.0f} %", 100),
        figure("tflop_per_s", "{:.3g}") if "bytes" not in info else "",
        figure("gemm_fraction", "{:.0f} %", 100) if "bytes" not in info else "",
        figure("nominal_fraction", "{:.0f} %", 100) if "bytes" not in info else "",
        figure("images_per_s", "{:.1f}"),
        figure("peak_memory_mb", "{:.0f} MB"),
    ]


def table(benches: list[Bench]) -> list[str]:
    """Return a Markdown table without empty columns."""
    rows = [row(bench) for bench in benches]
    shown = [i for i in range(len(COLUMNS)) if any(r[i] for r in rows)]
    lines = [[COLUMNS[i] for i in shown], ["---", *["---:"] * (len(shown) - 1)], *([r[i] for i in shown] for r in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


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
        lines += [
            "",
            f"## {group}",
            "",
            f"{machine_rate(benches[0]['extra_info'])} Commit {benches[0]['extra_info']['commit']}.",
            "",
            *table(benches),
        ]
        remarks += [b["extra_info"]["outside_error_rule"] for b in benches if "outside_error_rule" in b["extra_info"]]
    if remarks:
        lines += ["", "(*) Less exact than the error rule allows, in code that is not maefast's:", ""]
        lines += [f"- {remark}" for remark in remarks]
    return "\n".join(lines) + "\n"


def chart(results: dict[str, Any], path: Path) -> None:
    """Draw one panel per group: each contender's speed against the eager reference, and its median
    time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = grouped(results)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
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
    files = [out / f"{results['machine_info']['size']}.{kind}" for kind in ("json", "md", "png")]
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    files[1].write_text(markdown(results))
    chart(results, files[2])
    if steps := [bench for bench in results["benchmarks"] if bench["group"].startswith("step-")]:
        files.append(out / f"{results['machine_info']['size']}-step.png")
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
