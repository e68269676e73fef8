"""Compile every shipped kernel configuration ahead of time and report its resources; needs no GPU.

The launches that WORKLOADS make on tensors without memory are compiled for each architecture as a GPU would
compile them. The report lists registers of a thread, bytes of shared memory of a program, how many programs a
multiprocessor holds at a time, spills (loads and stores of local memory in the machine code) and tensor-core
instructions. The exit code is 1 where a kernel spills, asks for more shared memory than the architecture has,
or multiplies 16-bit or TF32 operands without tensor cores.

Another kernel joins by a line in WORKLOADS. Where nvcc exists, the kernels of the CUDA extension are reported
too: their registers, and bytes of spills.
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
from dbpkern import extension
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import IMPLEMENTATIONS
from dbpkern.ops._triton import Launch
from dbpkern.ops.correlation import triton_correlation, triton_gram
from dbpkern.ops.fold import triton_fold
from dbpkern.ops.fused_step import triton_fused
from dbpkern.ops.lowrank_statistics import triton_statistics
from dbpkern.ops.lowrank_step import triton_step
from dbpkern.ops.rates import triton_rates
from dbpkern.ops.sample_rows import triton_patches, triton_rows
from dbpkern.ops.transform import triton_transform


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has (CUDA programming guide, table of compute capabilities)."""

    shared_of_program: int
    """Bytes of shared memory that one program may ask for."""
    shared: int
    """Bytes of shared memory of all programs; each takes 1 KiB beyond what it asks for."""
    registers: int = 65_536
    warps: int = 64
    programs: int = 32

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """How many programs of these sizes it holds at a time."""
        of_warp = -(-registers * 32 // 256) * 256
        return min(
            self.programs,
            self.warps // warps,
            self.registers // (of_warp * warps),
            self.shared // (shared + 1024),
        )


LIMITS = {80: Limits(166_912, 167_936), 90: Limits(232_448, 233_472), 100: Limits(232_448, 233_472)}
"""By compute capability."""

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
"""The kinds of operands, with the dtype of samples that asks for them."""
WIDTHS = ((99,), (80,), (771,), (3072,))
"""The widest and oddest that take each row of a table of tiles by width."""
RANKS = ((768, 64), (3072, 64), (512, 48), (192, 16), (1024, 88), (768, 128))
"""Widths and ranks: what models have, every block of ranks, and the widest."""


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor that has a shape alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _etas() -> tuple[Tensor, Tensor]:
    """A number, which a kernel takes as such, and a tensor on the device."""
    return torch.tensor(0.1), meta()


def _fold(dtype: torch.dtype, d: int) -> None:
    triton_fold(meta(4 * d, d), meta(d, d), dtype)
    triton_fold(meta(4 * d, d, dtype=dtype), meta(d, d).mT, torch.float32)  # its gradient


def _transform(dtype: torch.dtype, d: int) -> None:
    triton_transform(meta(LAYERS, 1280, d, dtype=dtype), meta(LAYERS, d, d))


def _correlation(dtype: torch.dtype, d: int) -> None:
    out = torch.bfloat16 if dtype.itemsize == 2 else dtype
    triton_correlation(meta(LAYERS, 1280, d, dtype=dtype), 0.0, True, out)
    triton_correlation(meta(LAYERS, 1280, d, dtype=dtype), 0.5, False, out)


def _fused(dtype: torch.dtype, d: int) -> None:
    index = meta(1280, dtype=torch.int64)
    for eta in _etas():
        triton_fused(meta(12800, d, dtype=dtype), meta(d, d), index, eta, 0.0)


def _orthogonalize(dtype: torch.dtype, d: int) -> None:
    X = meta(LAYERS, d, 4 * d, dtype=dtype)
    A = triton_gram(X.mT)
    triton_gram(A, A, 2.0, -5.0)


def _rates(dtype: torch.dtype, d: int) -> None:
    for eta in _etas():
        triton_rates(meta(LAYERS), meta(LAYERS), meta(LAYERS, d), meta(LAYERS), eta, 0.5)
        triton_rates(meta(LAYERS), meta(LAYERS), meta(LAYERS, d), None, eta, 0.0)


def _sample_rows(dtype: torch.dtype, d: int) -> None:
    x, index = meta(256, 50, d, dtype=dtype), meta(1280, dtype=torch.int64)
    triton_rows(meta(1280, d, dtype=dtype), x, index)
    triton_rows(meta(256 * 49, d, dtype=dtype), x[:, 1:], None)


def _sample_patches(dtype: torch.dtype, size: int) -> None:
    images, index = meta(256, 3, 224, 224, dtype=dtype), meta(1280, dtype=torch.int64)
    out = meta(1280, 3 * size**2, dtype=dtype)
    triton_patches(out, images, index, (size, size), (size, size), (0, 0, 0, 0), (1, 1))


def _of_weights(dtype: torch.dtype, d: int, r: int | None) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Two weights, or what is shaped like them, and their R: full where there is no r."""
    factors = [meta(d, d)] if r is None else [meta(d, r), meta(r, r)]
    return [meta(4 * d, d, dtype=dtype) for _ in range(2)], factors * 2, [len(factors)] * 2


def _maps(dtype: torch.dtype, d: int, r: int | None = None) -> None:
    xs, factors, sizes = _of_weights(dtype, d, r)
    before = xs if r is None else [meta(4 * d, r) for _ in xs]
    IMPLEMENTATIONS["map_"](xs, factors, sizes, [], "triton")
    IMPLEMENTATIONS["map_"](xs, factors, sizes, before, "triton")
    if r is not None:
        IMPLEMENTATIONS["remember"](xs, factors, sizes, before, "triton")


def _adamw(dtype: torch.dtype, d: int, r: int | None = None) -> None:
    xs, factors, sizes = _of_weights(dtype, d, r)
    for lr in _etas():
        IMPLEMENTATIONS["adamw_"](
            xs, factors, sizes, xs, xs, xs, [meta() for _ in xs], lr, 0.9, 0.95, 1e-8, 0.05, "triton"
        )


def _lowrank_statistics(dtype: torch.dtype, d: int, r: int) -> None:
    triton_statistics(meta(LAYERS, 1280, d, dtype=dtype), meta(LAYERS, d, r))


def _lowrank_step(dtype: torch.dtype, d: int, r: int) -> None:
    stacks = [
        (meta(L, d, r), meta(L, r, r), meta(L), meta(L), meta(L, r, r), meta(L, d, r), meta(L, d))
        for L in (LAYERS, 2 * LAYERS, 4)
    ]
    for eta, scale_free, limit in zip(_etas(), (True, False), (0.5, None), strict=True):
        triton_step(stacks, eta, 0.0, scale_free, limit, 0.2)


# Full R, and the ranks that a preset gives to widths from ViT-Ti's to ViT-L's, and odd ones.
OF_WEIGHTS = ((768,), (771,), (192, 16), (768, 64), (1024, 88), (768, 128), (771, 63), (771, 99))

WORKLOADS: dict[str, tuple[Sequence[tuple[int, ...]], Callable[..., None]]] = {
    "adamw_": (OF_WEIGHTS, _adamw),
    "choose_rates_": (WIDTHS, _rates),
    "correlation": (WIDTHS, _correlation),
    "fold": (WIDTHS, _fold),
    "fused_step": (WIDTHS, _fused),
    "lowrank_statistics": (RANKS, _lowrank_statistics),
    "lowrank_step_": (RANKS, _lowrank_step),
    "maps": (OF_WEIGHTS, _maps),
    "orthogonalize": (WIDTHS, _orthogonalize),
    "sample_patches_": (((16,), (7,)), _sample_patches),
    "sample_rows_": (WIDTHS, _sample_rows),
    "transform": (WIDTHS, _transform),
}
"""By op, sizes and what launches its kernels on tensors without memory: `function(dtype of rows, *size)`."""


@dataclass(frozen=True)
class Configuration:
    """One kernel as it is compiled."""

    arch: int
    op: str
    kind: str
    size: tuple[int, ...]
    launch: Launch


def configurations(arch: int) -> list[Configuration]:
    """Every kernel as it is launched on an architecture, each once."""
    found: dict[tuple, Configuration] = {}
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for (op, (sizes, launches)), (kind, dtype) in itertools.product(WORKLOADS.items(), KINDS.items()):
            matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
            for size in sizes:
                with _dispatch.assume(divmod(arch, 10)), _triton.recording() as recorded:
                    launches(dtype, *size)
                for launch in recorded:
                    key = (str(specialize(launch)), launch.kernel, launch.warps, launch.stages)
                    found.setdefault(key, Configuration(arch, op, kind, size, launch))
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
    size: tuple[int, ...]
    kernel: str
    tiles: str
    warps: int
    registers: int
    shared: int
    spills: int
    multiplies: bool
    """Whether it is made of products for tensor cores."""
    tensor_cores: str

    @property
    def resident(self) -> int:
        """How many programs a multiprocessor holds at a time."""
        return LIMITS[self.arch].resident(self.registers, self.shared, self.warps)

    @property
    def failure(self) -> str | None:
        """What is wrong with it, or None."""
        if self.spills:
            return f"{self.spills} loads and stores of spilled registers"
        limit = LIMITS[self.arch].shared_of_program
        if self.shared > limit:
            return f"{self.shared} bytes of shared memory, the limit is {limit}"
        if self.multiplies and not self.tensor_cores:
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
        configuration.size,
        launch.kernel.__name__,
        f"{'x'.join(blocks)}, {launch.warps} warps, {launch.stages} stages",
        launch.warps,
        int(re.search(r"REG:(\d+)", usage)[1]),
        compiled.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        configuration.kind != "ieee" and "PRECISION" in constants,
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


def parse_ptxas(printed: str) -> list[dict[str, object]]:
    """What `ptxas -v` says of the CUDA extension's kernels: a row a kernel and architecture.

    Raises:
        ValueError: it is worded in another way.
    """
    pattern = (
        r"Compiling entry function '\w+ConfigI(?:NS_4(Bf16)E|f)Li(\d+)ELi(\d+)E\w+' for 'sm_(\d+)'[^']*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads[^']*?Used (\d+) registers"
    )
    rows = [
        {
            "rows": bf16.lower() or "fp32", "arch": int(arch), "rank": int(rank), "tile": int(tile),
            "registers": int(registers), "spills": int(stores) + int(loads),
        }
        for bf16, rank, tile, arch, stores, loads, registers in re.findall(pattern, printed)
    ]  # fmt: skip
    if not rows or len(rows) != printed.count("Compiling entry function"):
        raise ValueError("ptxas describes kernels in another way than expected")
    return sorted(rows, key=lambda row: tuple(row.values()))


def compile_extension(archs: Sequence[int]) -> list[dict[str, object]]:
    """The CUDA extension's kernels for these architectures."""
    with tempfile.TemporaryDirectory() as folder:
        named = " ".join(f"{arch // 10}.{arch % 10}" for arch in archs)
        source = extension.SOURCES / "lowrank_statistics.cu"
        return parse_ptxas(extension.nvcc("-fatbin", str(source), f"-o={folder}/kernels", named=named))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `python -m bench compile`."""
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=sorted(LIMITS), default=sorted(LIMITS),
        help="compute capabilities times ten (default: all)",
    )  # fmt: skip
    parser.add_argument("--op", nargs="+", choices=sorted(WORKLOADS), help="only these (default: all)")
    parser.add_argument("--jobs", type=options.count, default=2, help="processes (default: 2)")
    parser.add_argument("--json", type=options.file, metavar="FILE", help="also write the report there")


def table(found: Sequence[Resources]) -> str:
    """The report as Markdown."""
    columns = (
        "op", "kernel, tiles", "sm", "operands", "size", "registers", "shared", "resident", "spills",
        "tensor cores",
    )  # fmt: skip
    rows = [
        [
            r.op, f"{r.kernel} {r.tiles}", str(r.arch), r.kind, "x".join(map(str, r.size)), str(r.registers),
            str(r.shared), str(r.resident), str(r.spills), r.tensor_cores or "-",
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
        print(f"sm_{r.arch} {r.op}, {r.kind}, {r.size}, {r.kernel} {r.tiles}: {r.failure}", file=sys.stderr)
    print(f"\n{len(found)} kernels compiled, {len(failed)} with a failure")
    rows = []
    if not args.op:
        try:
            rows = compile_extension(args.arch)
            print("\nCUDA extension:\n" + record.table(list(rows[0]), [map(str, r.values()) for r in rows]))
        except extension.BuildError as error:
            print(f"\nthe CUDA extension is not reported: {error}")
    spilled = [row for row in rows if row["spills"]]
    if args.json:
        head = record.header(argv, torch.device("cpu"), "all")
        kernels = [asdict(r) | {"resident": r.resident} for r in found]
        args.json.write_text(json.dumps(head | {"kernels": kernels, "extension": rows}, indent=1) + "\n")
    return int(bool(failed or spilled))
