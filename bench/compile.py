"""Compile every shipped kernel configuration ahead of time and report its resources; needs no GPU.

Each row of the tables in dbpkern/configs/ is compiled for its architecture as a launch would compile it, at
widths that take it. The report lists registers of a thread, bytes of shared memory of a block, spills (loads
and stores of local memory in the machine code) and tensor-core instructions. The exit code is 1 where a
kernel spills, asks for more shared memory than the architecture has, or multiplies 16-bit or TF32 operands
without tensor cores.
"""

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import options, record
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._triton import Launch
from dbpkern.ops.apply import triton_apply
from dbpkern.ops.correlation import triton_correlation
from dbpkern.ops.fold import triton_fold
from dbpkern.ops.fused_step import triton_fused
from dbpkern.ops.lowrank_fold import triton_lowrank
from dbpkern.ops.transform import triton_transform
from dbpkern.ops.update import triton_update

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that a block may ask for, by compute capability (CUDA programming guide)."""

TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA")
"""Machine instructions of 16-bit and TF32 products: Hopper's, those of all since Volta, Blackwell's."""

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}

LAYERS = 12
KINDS = {"16bit": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
"""The rows' kinds of operands, with the dtype of samples that asks for them."""


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has a shape alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _fold(d: int, dtype: torch.dtype) -> None:
    triton_fold(meta(4 * d, d), meta(d, d), dtype)
    triton_fold(meta(4 * d, d, dtype=dtype), meta(d, d).mT, torch.float32)  # its gradient


def _transform(d: int, dtype: torch.dtype) -> None:
    triton_transform(meta(LAYERS, 1280, d, dtype=dtype), meta(LAYERS, d, d))


def _correlation(d: int, dtype: torch.dtype) -> None:
    triton_correlation(meta(LAYERS, 1280, d, dtype=dtype), 0.0, False)
    triton_correlation(meta(LAYERS, 1280, d, dtype=dtype), 0.5, True)


def _rates() -> tuple[Tensor, Tensor]:
    """A number, which the kernel takes as such, and a tensor on the device."""
    return torch.tensor(0.1), meta()


def _apply(d: int, dtype: torch.dtype) -> None:
    for rate in _rates():
        triton_apply(meta(LAYERS, d, d), meta(LAYERS, d, d, dtype=dtype), rate)


def _update_form(d: int, dtype: torch.dtype) -> None:
    for rate in _rates():
        triton_update(meta(LAYERS, d, d), meta(LAYERS, d, d, dtype=dtype), rate, 0.0)


def _update_associate(d: int, dtype: torch.dtype) -> None:
    for rate in _rates():
        triton_update(meta(LAYERS, d, d), meta(LAYERS, d // 2, d, dtype=dtype), rate, 0.0)


def _fused(d: int, dtype: torch.dtype) -> None:
    index = meta(d // 3, dtype=torch.int64)
    for rate in _rates():
        triton_fused(meta(4 * d, d, dtype=dtype), meta(d, d), index, rate, 0.0)


def _lowrank(d: int, dtype: torch.dtype, r: int) -> None:
    triton_lowrank(meta(1, 4 * d, d, dtype=dtype), meta(1, d, r), meta(1, r, r), dtype)
    triton_lowrank(meta(1, 4 * d, d), meta(1, d, r), meta(1, r, r), dtype)  # a weight under autocast


# op -> the table whose rows it uses, and its launches at width d with samples of a dtype
WORKLOADS: dict[str, tuple[str, Callable[..., None]]] = {
    "fold": ("matmul", _fold),
    "transform": ("matmul", _transform),
    "correlation": ("correlation", _correlation),
    "apply_": ("apply_", _apply),
    "update_, M formed": ("update_form", _update_form),
    "update_, associated": ("update_associate", _update_associate),
    "fused_step, on chip": ("fused_on_chip", _fused),
    "fused_step, pipeline": ("fused_pipeline", _fused),
    "lowrank_fold, lowrank_transform": ("lowrank_fold", _lowrank),
}


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is compiled."""

    arch: int
    op: str
    kind: str
    d: int
    launch: Launch


def sizes(table: str, row: dict[str, int]) -> list[dict[str, int]]:
    """The widest and oddest sizes that take a row of a table."""
    least, multiple = row["min_d"], row["multiple"]
    if table == "lowrank_fold":  # its rows go by the rank
        r = next(r for r in (64, 128, 256) if r >= least)
        return [{"d": 768, "r": r} if multiple == 16 else {"d": 771, "r": r - 1}]
    if table == "fused_on_chip":
        return [{"d": 64}, {"d": 51}]
    if multiple == 16:
        return [{"d": 3072 if least else 80}]
    return [{"d": 771 if least else 99}]


def configurations(arch: int) -> list[Configuration]:
    """Every kernel of an architecture's table, each once."""
    found: dict[tuple, Configuration] = {}
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for (op, (table, launches)), (kind, dtype) in itertools.product(WORKLOADS.items(), KINDS.items()):
            matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
            name = f"sm_{arch}"
            for row in _dispatch.rows(name, table, kind) or ():
                for size in sizes(table, row):
                    with _dispatch.assume(name), _triton.recording() as recorded:
                        launches(dtype=dtype, **size)
                    for launch in recorded:
                        key = (str(specialize(launch)), launch.kernel, launch.warps, launch.stages)
                        found.setdefault(key, Configuration(arch, op, kind, size["d"], launch))
    finally:
        matmul.fp32_precision = before
    return list(found.values())


def specialize(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], object], dict[tuple[int], list]]:
    """Signature, constants and attributes of the arguments, as Triton derives them at a launch.

    An integer that is 1 becomes a constant; multiples of 16 and pointers, which PyTorch aligns, are marked.
    """
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            constants[position,] = launch.constants[name]
            continue
        value = launch.args[name]
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[position,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name] = "constexpr"
            constants[position,] = 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes."""

    arch: int
    op: str
    kind: str
    d: int
    kernel: str
    tiles: str
    registers: int
    shared: int
    spills: int
    tensor_cores: str

    @property
    def failure(self) -> str | None:
        """What is wrong with it, or None."""
        if self.spills:
            return f"{self.spills} loads and stores of spilled registers"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"{self.shared} bytes of shared memory, the limit is {SHARED_LIMIT[self.arch]}"
        if self.kind != "ieee" and not self.tensor_cores:
            return f"no tensor-core instruction ({', '.join(TENSOR_CORES)})"
        return None


def _tool(name: str) -> str:
    """A program of Triton's package."""
    import triton

    return str(Path(triton.__path__[0], "backends", "nvidia", "bin", name))


def compile_one(configuration: Configuration) -> Resources:
    """Compile a configuration to machine code and read it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = configuration.launch
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        compiled = triton.compile(
            ASTSource(launch.kernel, *specialize(launch)),
            target=GPUTarget("cuda", configuration.arch, 32),
            options={"num_warps": launch.warps, "num_stages": launch.stages},
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [_tool("cuobjdump"), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    constants = launch.constants
    blocks = [str(value) for name, value in constants.items() if name.startswith("BLOCK")]
    return Resources(
        configuration.arch,
        configuration.op,
        configuration.kind,
        configuration.d,
        launch.kernel.__name__,
        f"{'x'.join(blocks)}, {launch.warps} warps, {launch.stages} stages",
        int(re.search(r"REG:(\d+)", usage)[1]),
        compiled.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        " ".join(name for name in TENSOR_CORES if re.search(rf"\b{name}\b", code)),
    )


_work: list[Configuration] = []  # inherited by the processes that are forked


def _compile_number(i: int) -> Resources:
    return compile_one(_work[i])


def compile_all(work: list[Configuration], jobs: int) -> list[Resources]:
    """Compile in several processes; results in the order of `work`."""
    global _work
    _work = work
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        done = []
        for resources in pool.map(_compile_number, range(len(work))):
            done.append(resources)
            record.progress(f"compiled {len(done)} of {len(work)}")
    return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench compile`."""
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=sorted(SHARED_LIMIT),
        help="compute capabilities times ten (default: all)",
    )  # fmt: skip
    parser.add_argument("--op", nargs="+", choices=sorted(WORKLOADS), help="only these (default: all)")
    parser.add_argument("--jobs", type=options.count, default=2, help="processes (default: 2)")
    parser.add_argument("--json", type=options.file, metavar="FILE", help="also write the report there")


def table(found: Sequence[Resources]) -> str:
    """The report as Markdown."""
    columns = ("op", "kernel, tiles", "sm", "operands", "d", "registers", "shared", "spills", "tensor cores")
    rows = [
        [
            r.op, f"{r.kernel} {r.tiles}", str(r.arch), r.kind, str(r.d),
            str(r.registers), str(r.shared), str(r.spills), r.tensor_cores or "-",
        ]
        for r in found
    ]  # fmt: skip
    return record.table(columns, rows)


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Compile, print the report; returns the exit code."""
    if _triton.triton is None or _triton.INTERPRETED:
        reason = "Triton is not installed" if _triton.triton is None else "TRITON_INTERPRET=1 is set"
        print(f"nothing can be compiled: {reason}", file=sys.stderr)
        return 2
    work = [c for arch in args.arch for c in configurations(arch) if not args.op or c.op in args.op]
    found = compile_all(work, args.jobs)
    print(table(found))
    failed = [r for r in found if r.failure]
    for r in failed:
        print(f"sm_{r.arch} {r.op}, {r.kind}, d = {r.d}, {r.kernel} {r.tiles}: {r.failure}", file=sys.stderr)
    print(f"\n{len(found)} kernels compiled, {len(failed)} with a failure")
    if args.json:
        head = record.header(argv, torch.device("cpu"), "all")
        args.json.write_text(json.dumps(head | {"kernels": [asdict(r) for r in found]}, indent=1) + "\n")
    return int(bool(failed))
