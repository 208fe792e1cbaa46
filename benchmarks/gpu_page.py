"""Write the tables of docs/gpu.md from the JSON under benchmarks/results/h200/."""

import json
from pathlib import Path
from typing import Any

import report

PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
BEGIN, END = "<!-- benchmarks/gpu_page.py writes these tables -->\n", "<!-- end of the tables -->\n"
ROWS = {"attention": "Attention, the kernels alone, bf16", "gemm": "Products of `linear`, a prototype of the kernels, bf16"}


def table_of_rows(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table of sizes and of milliseconds, empty where a contender did not run."""
    sizes = [key for key in rows[0] if isinstance(rows[0][key], int | str)]
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    lines = [[*sizes, *names], ["---"] * len(sizes) + ["---:"] * len(names)]
    for row in rows:
        milliseconds = (f"{row['ms'][name]:.3f}" if name in row["ms"] else "" for name in names)
        lines.append([*(str(row[key]) for key in sizes), *milliseconds])
    return report.markdown_table(lines)


def tables(results: Path) -> str:
    """Return a table for each file that exists: those of scripts, then those of the benchmarks."""
    lines: list[str] = []
    for name, title in ROWS.items():
        if (path := results / f"{name}.json").exists():
            found = json.loads(path.read_text())
            heading = f"{title}: milliseconds, {found['device']}, torch {found['torch']}."
            lines += ["", heading, "", *table_of_rows(found["timing"])]
    if (path := results / "full.json").exists():
        found = json.loads(path.read_text())
        for group, benches in report.grouped(found).items():
            rate = report.machine_rate(benches[0]["extra_info"])
            lines += ["", f"`{group}`, torch {found['machine_info']['torch']}. {rate}", "", *report.table(benches)]
    return "\n".join([*lines, "", ""])


def page(text: str, results: Path) -> str:
    """Return the page with its tables replaced. Raises ValueError if a marker line is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE.name} must hold the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + begin + tables(results) + end + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), report.RESULTS / "h200"))
