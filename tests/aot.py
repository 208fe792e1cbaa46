"""Ahead-of-time compilation of the kernels that a launcher launches, for any architecture.

No GPU is needed: the launcher gets CPU tensors, recorders replace its kernels, and the recorded
launches are compiled, specialised on their arguments.
"""

import inspect
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maefast.kernels import _common
from maefast.tuned import attention_tables

OPTIONS = ("num_warps", "num_stages", "maxnreg")
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int64: "*i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Launch:
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Usage:
    """Registers and bytes of stack (spills) of a thread, bytes of shared memory of a program.

    loads, stores  bytes of an access to global memory -> instructions
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int
    ptx: str
    loads: Counter[int]
    stores: Counter[int]

    @property
    def has_tf32(self) -> bool:
        return ".tf32" in self.ptx


@contextmanager
def recorded(module: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of the kernels of `module`, and of the shared ones, within the block."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
                bound = inspect.signature(self.kernel.fn).bind(*args, **kwargs)
                launches.append(Launch(self.kernel, tuple(bound.args), options))

            return launch

    kernels = [
        (owner, name, kernel) for owner in (module, _common) for name, kernel in vars(owner).items() if name.endswith("_kernel")
    ]
    for owner, name, kernel in kernels:
        setattr(owner, name, Recorder(kernel))
    try:
        yield launches
    finally:
        for owner, name, kernel in kernels:
            setattr(owner, name, kernel)


def source_of(launch: Launch) -> ASTSource:
    """Return what the JIT would compile: 1 is a constant, multiples of 16 are known to be such."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (param, value) in enumerate(zip(launch.kernel.params, launch.args, strict=True)):
        divisible = False
        if param.is_constexpr or value is None or value is True or value is False or (isinstance(value, int) and value == 1):
            signature[param.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        elif isinstance(value, Tensor):
            signature[param.name] = POINTERS[value.dtype]
            divisible = value.data_ptr() % 16 == 0
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def accesses(binary: Path) -> dict[str, tuple[Counter[int], Counter[int]]]:
    """Loads and stores of global memory in the machine code of each kernel, by their bytes."""
    sass = subprocess.run([CUOBJDUMP, "-sass", binary], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in sass.split("Function : ")[1:]:
        loads, stores = Counter(), Counter()
        for kind, suffixes in re.findall(r"\b(LDG|LDGSTS|STG)((?:\.\w+)+)", part):
            width = next((_BYTES[suffix] for suffix in suffixes.split(".") if suffix in _BYTES), 4)
            (stores if kind == "STG" else loads)[width] += 1
        found[part.split()[0]] = loads, stores
    assert found, f"there is no kernel in {binary}"
    return found


def _tile(table: str, line: int) -> str:
    sizes = [(row["head_width"], row["tokens"]) for row in attention_tables()[table]]
    return f"{sizes[line][0]}, {sizes[line][1]}, {sizes[:line].count(sizes[line])}"


_DTYPES = {"float": "fp32", "__half": "fp16", "F16": "fp16", "__nv_bfloat16": "bf16", "Bf16": "bf16", "unsigned char": "uint8"}


def named(symbol: str) -> tuple[str, str, str]:
    """Return name, constants and dtypes of a kernel of csrc/cuda. Its template has the constants.
    A line of attention_tiles.inc has its head width, tokens, and its number among the lines with
    the same."""
    said = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    said = re.sub(r"\(anonymous namespace\)::|maefast::cuda::|^void ", "", said)
    said = re.sub(r"\b(Forward|Backward)<(\d+)>", lambda line: _tile(line[1].upper(), int(line[2])), said)
    kernel, arguments = re.match(r"(\w+)(?:<(.*)>)?\(", said).groups()
    values = arguments.strip().split(", ") if arguments else []
    dtypes = [_DTYPES[value] for value in values if value in _DTYPES]
    return kernel, " ".join(value for value in values if value not in _DTYPES), " ".join(dtypes)


def compiled(launch: Launch, capability: int, workdir: Path) -> Usage:
    binary = triton.compile(source_of(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    cubin = workdir / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    report = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True)
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report.stdout + report.stderr)}
    ((loads, stores),) = accesses(cubin).values()
    return Usage(
        kernel=launch.kernel.fn.__name__,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=binary.metadata.shared,
        warps=launch.options.get("num_warps", 4),
        ptx=binary.asm["ptx"],
        loads=loads,
        stores=stores,
    )
