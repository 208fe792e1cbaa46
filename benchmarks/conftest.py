"""Options, the session fixture that measures each group once, and JSON without private data."""

from collections.abc import Callable
from typing import Any

import machine
import pytest
import torch
from measure import Group, Options
from rotation import ReplayClock
from skips import pytest_terminal_summary  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="ViT-B/16 sizes, every dtype; minutes, not seconds, per group")
    parser.addoption("--contenders", help="comma-separated names: only these take part in their groups")
    parser.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def options_of(config: pytest.Config) -> Options:
    only = config.getoption("--contenders")
    device = torch.device(config.getoption("--device"))
    return Options(full=config.getoption("--full"), device=device, only=frozenset(only.split(",")) if only else None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a test with each contender of the module's workloads, group by group."""
    if "workload" in metafunc.fixturenames:
        options = options_of(metafunc.config)
        pairs = [(w, name) for w in metafunc.module.workloads(options.full, options.device) for name in options.contenders(w)]
        metafunc.parametrize(("workload", "contender"), pairs, ids=[f"{w.name}-{name}" for w, name in pairs])


@pytest.fixture(scope="session")
def groups(request: pytest.FixtureRequest) -> Callable[[Any, str], Group]:
    """Measure a workload at its first use. If its gate fails, all its contenders fail."""
    options, done = options_of(request.config), {}

    def measured(workload: Any, module: str) -> Group:
        if workload not in done:
            try:
                done[workload] = Group(workload, module, options)
            except Exception as error:
                done[workload] = error
        if isinstance(done[workload], AssertionError):
            pytest.fail(f"not timed, a result in this group is wrong: {done[workload]}", pytrace=False)
        if isinstance(done[workload], Exception):
            raise done[workload]
        return done[workload]

    return measured


@pytest.fixture
def replay(request: pytest.FixtureRequest, groups) -> Callable[[Any, ReplayClock, Any, str], None]:
    """Replay a contender's samples through pytest-benchmark on the test's clock."""

    def through(benchmark: Any, clock: ReplayClock, workload: Any, contender: str) -> None:
        if benchmark.disabled:
            pytest.skip("benchmarks are disabled")
        group = groups(workload, request.path.stem)
        if contender in group.skipped:
            benchmark.skipped = True
            pytest.skip(group.skipped[contender])
        benchmark.group = workload.name
        benchmark.extra_info.update(group.extra_info(contender))
        clock.replay(benchmark, group.samples[contender])

    return through


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    options = options_of(config)
    return machine.describe(options.device) | {"size": "full" if options.full else "quick"}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep only stats and extra_info, which the report needs."""
    output_json["commit_info"] = {"id": machine.commit()}
    for bench in output_json["benchmarks"]:
        for key in ("options", "params", "param"):
            bench.pop(key, None)
