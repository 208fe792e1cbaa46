"""benchmarks/gpu_page.py: the tables of docs/gpu.md are those of the committed JSON."""

import json

import gpu_page
import pytest
import report


def test_the_page_holds_what_was_measured():
    text = gpu_page.PAGE.read_text()
    assert gpu_page.page(text, report.RESULTS / "h200") == text
    with pytest.raises(ValueError, match="must hold the lines"):
        gpu_page.page("# On a GPU\n", report.RESULTS / "h200")


def test_tables_of_what_is_there(tmp_path):
    assert gpu_page.tables(tmp_path) == "\n"
    timing = [{"T": 50, "ms": {"ours": 0.5, "flash": 1.0}, "ratio": 2.0}, {"T": 65, "ms": {"ours": 0.25}, "ratio": 1.0}]
    (tmp_path / "attention.json").write_text(json.dumps({"device": "a GPU", "torch": "2.10", "timing": timing}))
    info = {"contender": "reference", "flops": 2_000_000_000, "gemm_tflop_per_s": 500.0}
    benches = [{"group": "step-bf16", "extra_info": info, "stats": {"median": 2e-3, "iqr": 1e-4}}]
    (tmp_path / "full.json").write_text(json.dumps({"machine_info": {"torch": "2.11"}, "benchmarks": benches}))
    assert gpu_page.tables(tmp_path).splitlines() == [
        "",
        "Attention, the kernels alone, bf16: milliseconds, a GPU, torch 2.10.",
        "",
        "| T | ours | flash |",
        "| --- | ---: | ---: |",
        "| 50 | 0.500 | 1.000 |",
        "| 65 | 0.250 |  |",
        "",
        "`step-bf16`, torch 2.11. 2.0 GFLOP; a matmul ran at 500 TFLOP/s.",
        "",
        "| contender | median | IQR |",
        "| --- | ---: | ---: |",
        "| reference | 2 ms | 100 us |",
        "",
    ]
