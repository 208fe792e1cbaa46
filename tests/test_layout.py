"""The shape of the repository: imports, the parts of an op, one set of pinned versions."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
import yaml
from support import NATIVE

import maefast
from maefast import dispatch, kernels, ops

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "maefast"

# Bottom up; a module imports from layers below its own, and a package also from itself.
LAYERS = (
    {"_version"},
    {"_torch", "_apex", "_files", "_flash_attn", "_library", "gpu", "init", "positions", "reference"},
    {"_C"},
    {"autocast", "cpu", "testing", "tuned"},
    {"gemm"},
    {"kernels"},
    {"request"},
    {"dispatch"},
    {"ops"},
    {"masking", "plain", "pyramid"},
    {"blocks", "patch_embed"},
    {"backbone", "checkpoint", "explain"},
    {"model", "encoder"},
    {"models_mae", "models_vit", "hf"},
    {""},  # maefast/__init__.py
    {"train"},
    {"cli"},
    {"__main__"},
)
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}

OPS = sorted(path.stem for path in (PACKAGE / "ops").glob("[!_]*.py"))
SCHEMAS = re.findall(r'^"(.*)",$', (PACKAGE / "schemas.inc").read_text(), flags=re.MULTILINE)
# Ops that join others.
JOINED = {
    "mask_patches": {"random_masking", "gather_patches"},
    "transformer_block": {"layer_norm", "linear", "attention", "add_layer_norm", "bias_gelu"},
}
GPU_ALONE = {"linear_gelu"}  # what linear and bias_gelu are there in one launch
NATIVE_OPS = sorted({re.sub(r"_(fwd|bwd)\(.*", "", schema) for schema in SCHEMAS} - set(JOINED) - GPU_ALONE)


def module_name(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def is_module(parts: tuple[str, ...]) -> bool:
    return ROOT.joinpath(*parts).with_suffix(".py").exists() or ROOT.joinpath(*parts, "__init__.py").exists()


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the modules of maefast that a file imports anywhere, as parts of their names."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names if alias.name.split(".")[0] == "maefast")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            if base[0] == "maefast":
                yield from {(*base, alias.name) if is_module((*base, alias.name)) else base for alias in node.names}


PROGRAMS = {("maefast", "kernels", "tune")}  # run by `python -m`, imported by nothing


def top(parts: tuple[str, ...]) -> str:
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    program = module_name(path)[:3] in PROGRAMS
    mine = "cli" if program else top(module_name(path))
    assert mine in LEVEL, f"give {mine} a layer in this test"
    for imported in imports(path):
        if program and imported[:3] == module_name(path)[:3]:
            continue
        assert imported[:3] not in PROGRAMS
        theirs = top(imported)
        inside = mine == theirs and mine in ("kernels", "ops", "checkpoint", "testing", "train", "cli", "hf")
        assert inside or LEVEL[theirs] < LEVEL[mine], f"{mine} must not import {'.'.join(imported)}"


# A wing of train imports itself, the floor (files of train/ itself) and these; the floor no wing.
WINGS: dict[str, set[str]] = {
    "data": set(),
    "pretrain": {"data"},
    "evaluate": {"data"},
    "ablation": {"data", "evaluate", "pretrain"},
    "demo": {"data"},
}
DOORS = {("maefast", "train", "dataset"): "data"}  # names for scripts; a wing's files move
TRAIN = sorted((PACKAGE / "train").rglob("*.py"))


def wing(parts: tuple[str, ...]) -> str:
    return parts[2] if len(parts) > 2 and parts[2] in WINGS else ""


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_wings_of_train(path):
    mine = wing(module_name(path))
    allowed = {"", mine, DOORS.get(module_name(path)), *WINGS.get(mine, ())}
    for imported in imports(path):
        if imported[:2] == ("maefast", "train"):
            assert wing(imported) in allowed, f"{mine or 'the floor'} must not import {'.'.join(imported)}"


@pytest.mark.parametrize("door", DOORS)
def test_nothing_of_maefast_goes_through_a_door(door):
    assert not [path for path in PACKAGE.rglob("*.py") if door in set(imports(path))]


def test_every_folder_of_train_is_a_wing():
    assert {path.parent.name for path in TRAIN} == {"train", *WINGS}


def test_no_circle_of_imports():
    graph = {module_name(path): set(imports(path)) - {module_name(path)} for path in PACKAGE.rglob("*.py")}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_public_names_of_train_mean_one_thing():
    places = defaultdict[str, list[str]](list)
    for path in TRAIN:
        for node in ast.parse(path.read_text()).body:
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else ()
            names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            for name in names:
                places[name].append(str(path.relative_to(PACKAGE)))
    assert {name: where for name, where in places.items() if len(where) > 1 and not name.startswith("_")} == {}


def test_the_walk_over_imports_sees_them():
    assert set(imports(PACKAGE / "dispatch.py")) == {("maefast", name) for name in ("_library", "gpu", "request")}
    assert ("maefast", "ops") in set(imports(PACKAGE / "blocks.py"))
    assert {("maefast", "ops", "_checks"), ("maefast", "dispatch")} <= set(imports(PACKAGE / "ops" / "unshuffle.py"))
    assert ("maefast", "init") in set(imports(PACKAGE / "model.py"))


def private_names_of_torch(source: str) -> list[str]:
    """Return the names of torch with an underscore, and the private hooks, that a file uses."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr, flags=re.IGNORECASE):
            if ast.unparse(node).startswith("torch.") or node.attr.endswith("_hooks"):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if re.match(r"torch\..*\b_", alias.name)]
        elif isinstance(node, ast.ImportFrom) and re.match(r"torch\b", node.module or ""):
            found += [f"{node.module}.{alias.name}" for alias in node.names if re.search(r"\._", f"{node.module}.{alias.name}")]
    return found


def test_the_search_for_private_names_finds_them():
    source = """
import torch, torch._dynamo
from torch.nn.modules.module import _has_any_global_hook, Module
from torch._subclasses import fake_tensor
torch.ops.mkldnn._linear_pointwise(torch._C._get_x(), torch.rand(2), self._rand)
module._forward_hooks, torch.__version__
"""
    found = ["module._forward_hooks", "torch._C", "torch._C._get_x", "torch._dynamo", "torch._subclasses.fake_tensor"]
    found += ["torch.nn.modules.module._has_any_global_hook", "torch.ops.mkldnn._linear_pointwise"]
    assert sorted(private_names_of_torch(source)) == found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_torch_are_asked_for_in_one_file(path):
    names = private_names_of_torch(path.read_text())
    assert bool(names) == (path == PACKAGE / "_torch.py"), names


@pytest.mark.parametrize("op", OPS)
def test_ops_do_not_import_each_other(op):
    siblings = {parts[2] for parts in imports(PACKAGE / "ops" / f"{op}.py") if parts[:2] == ("maefast", "ops") and len(parts) > 2}
    assert siblings <= {"_checks", "_tokens"} | JOINED.get(op, set())


@pytest.mark.parametrize("op", sorted(kernels.OPS))
def test_kernels_do_not_import_each_other(op):
    siblings = {parts[2] for parts in imports(PACKAGE / "kernels" / f"{op}.py") if len(parts) > 2}
    assert siblings <= {"_common", "_norm"}
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_native_includes(path):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(), flags=re.MULTILINE)
    if path.name != "stable.h":
        assert not [name for name in included if name.startswith(("torch/", "ATen/", "c10/"))]
    assert not [name for name in included if Path(name).stem in set(NATIVE_OPS) - {path.stem}]
    assert not [name for name in included if name.startswith(("Python", "pybind11"))]


def test_torch_headers_are_those_of_the_stable_interface():
    included = re.findall(r"#include <((?:torch|ATen|c10)/[^>]+)>", (ROOT / "csrc" / "stable.h").read_text())
    assert included
    assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in included)


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_complete(op):
    assert op in ops.__all__
    assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists()
    assert getattr(ops, op).__doc__
    if op == "masking_noise":  # its own reference: torch.rand
        return
    assert callable(getattr(ops, f"{op}_ref"))
    assert op in dispatch.OPS
    assert op in NATIVE_OPS or op in JOINED
    benchmarks = [ast.parse(path.read_text()) for path in (ROOT / "benchmarks").glob("test_*.py")]
    assert op in {node.value for tree in benchmarks for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_every_op_has_a_module():
    assert set(dispatch.OPS) == set(NATIVE_OPS) | set(JOINED) == set(OPS) - {"masking_noise"}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "ops").glob("test_*.py")}
    assert tests == {*OPS, "battery"}


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_native_sources(op):
    source = ROOT / "csrc" / "cpu" / f"{op}.cpp"
    assert source.exists()
    assert f"csrc/cpu/{op}.cpp" in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.split("(")[0])
def test_schemas_are_registered(schema):
    name = schema.split("(")[0]
    op = re.sub(r"_(fwd|bwd)$", "", name)
    for library in ("maefast", "maefast_triton") if op in kernels.OPS else ("maefast",):
        assert str(getattr(getattr(torch.ops, library), name).default._schema) == f"{library}::{schema}"
        assert torch._library.simple_registry.singleton.find(f"{library}::{name}").fake_impl.kernel is not None
    on_cpu = NATIVE and op not in GPU_ALONE.union(JOINED)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"maefast::{name}", "CPU") == on_cpu


def test_triton_ops_are_known_to_dispatch():
    known = {name for name, op in dispatch.OPS.items() if any(kernel.backend == "triton" for kernel in op.kernels)}
    assert known - set(JOINED) == kernels.OPS


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", maefast.__version__)


def test_versions_are_pinned_once():
    """The hooks use the versions of the development environment."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.\[\]-]+==[\w.+]+", pin) for pin in pins), pins
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repository["repo"] for repository in repositories} == {"local"}
    used = {name for repository in repositories for hook in repository["hooks"] for name in hook["additional_dependencies"]}
    assert used <= set(pins)
    assert {dependency.split("==")[0] for dependency in used} == {"ruff", "clang-format", "mypy"}
