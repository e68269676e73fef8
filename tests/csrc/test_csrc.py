"""The sources of the CUDA extension: its planner, its kernel in an emulated GPU, its build.

Tests that need a C++ compiler or nvcc are skipped where that is missing, unless the environment variable CI
is set: then they fail. Those on a GPU need a build, which `python -m dbpkern.extension` makes.
"""

import ctypes
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from compilers import compiler, require

from bench import compile as ahead
from dbpkern import extension

ROOT = Path(__file__).parents[2]

# What the planner asks a device for.
A100 = {
    "capability": 80,
    "processors": 108,
    "shared_per_block": 163 * 1024,
    "shared_per_processor": 164 * 1024,
    "l2_bytes": 40 * 2**20,
}
RTX4090 = {
    "capability": 89,
    "processors": 128,
    "shared_per_block": 99 * 1024,
    "shared_per_processor": 100 * 1024,
    "l2_bytes": 72 * 2**20,
}
H100 = {
    "capability": 90,
    "processors": 132,
    "shared_per_block": 227 * 1024,
    "shared_per_processor": 228 * 1024,
    "l2_bytes": 50 * 2**20,
}
DEVICES = {"A100": A100, "RTX4090": RTX4090, "H100": H100}
# (layers, rows, features, rank)
SHAPES = [
    (1, 1, 1, 8),
    (1, 1, 8, 8),
    (3, 131, 37, 8),
    (2, 67, 45, 17),
    (1, 1000003, 9, 9),
    (12, 1280, 768, 64),
    (12, 12800, 3072, 256),
    (25, 40, 100, 100),
    (7, 5000, 129, 65),
    (1, 64, 100000, 16),
]


@pytest.fixture(scope="module")
def planner(tmp_path_factory):
    """The host-side planner as a Python module."""
    library = tmp_path_factory.mktemp("planner") / f"dbpkern_planner{sysconfig.get_config_var('EXT_SUFFIX')}"
    include = Path(torch.__file__).with_name("include")
    includes = [f"-I{f}" for f in (ROOT / "csrc", include, sysconfig.get_paths()["include"])]
    sources = [ROOT / "tests/support/simt/planner_module.cpp", ROOT / "csrc/planner.cpp"]
    flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run([compiler(), *flags, *includes, *sources, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("dbpkern_planner", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(planner, shape, element=2, device=A100, **changes):
    names = ("layers", "rows", "features", "rank")
    return planner.plan(**{**dict(zip(names, shape, strict=True)), "element": element, **device, **changes})


class TestPlanner:
    @pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
    @pytest.mark.parametrize("element", [2, 4])
    @pytest.mark.parametrize("rank", [8, 16, 17, 64, 100, 256])
    @pytest.mark.parametrize("layers", [1, 100])
    def test_tiles_fit_the_device(self, planner, device, element, rank, layers):
        made = plan(planner, (layers, 5000, 999, rank), element, device)
        tiling = made.tiling
        assert rank <= tiling.padded <= max(16, 2 * rank - 1)
        assert tiling.shared_bytes <= device["shared_per_block"]
        assert made.blocks_per_processor >= 1
        assert made.blocks_per_processor * (tiling.shared_bytes + 1024) <= device["shared_per_processor"]
        assert made.blocks_per_processor <= tiling.blocks_by_registers
        assert 1 <= made.grid <= device["processors"] * made.blocks_per_processor

    def test_the_op_knows_the_ranks(self, planner):
        module = importlib.import_module("dbpkern.ops.lowrank_statistics")
        assert range(planner.min_rank, planner.max_rank + 1) == module.RANKS

    def test_more_work_gets_the_larger_tile(self, planner):
        assert plan(planner, (1, 500, 768, 64)).tiling.tile == 64
        assert plan(planner, (100, 5000, 768, 64)).tiling.tile == 128

    @pytest.mark.parametrize("element", [2, 4])
    @pytest.mark.parametrize("padded", [16, 32, 64, 128, 256])
    @pytest.mark.parametrize("tile", [64, 128])
    def test_tiling_is_consistent(self, planner, element, padded, tile):
        t = planner.Tiling(element=element, padded=padded, tile=tile)
        assert tile // t.warp_rows * (padded // t.warp_columns) * 32 == t.threads <= 512
        assert (tile % t.warp_rows, padded % t.warp_columns, t.warp_rows % 16, t.warp_columns % 16) == (
            0,
        ) * 4
        assert t.a_bytes >= element * max(tile * t.a_pitch_by_rows, t.depth * t.a_pitch_by_columns)
        assert t.stage_bytes >= t.a_bytes + element * t.depth * t.b_pitch
        # Slices, operands and rows start at multiples of 16 bytes, and tiles hold whole slices of rows.
        assert t.stage_bytes % 16 == t.a_bytes % 16 == 0
        assert all(p * element % 16 == 0 for p in (t.a_pitch_by_rows, t.a_pitch_by_columns, t.b_pitch))
        assert tile % t.depth == 0
        # 65,536 registers; ptxas is told to leave room for this number of blocks.
        assert t.blocks_by_registers * t.threads * 128 <= 65536

    @pytest.mark.parametrize("element", [2, 4])
    @pytest.mark.parametrize("padded", [16, 32, 64, 128, 256])
    @pytest.mark.parametrize("tile", [64, 128])
    def test_no_two_lanes_meet_in_a_bank(self, planner, element, padded, tile):
        t = planner.Tiling(element=element, padded=padded, tile=tile)
        by_matrix = (
            [t.a_pitch_by_rows] if element == 4 else [t.a_pitch_by_rows, t.a_pitch_by_columns, t.b_pitch]
        )
        for pitch in by_matrix:  # ldmatrix: eight rows of 16 bytes at once
            assert len({row * pitch * element // 16 % 8 for row in range(8)}) == 8
        if element == 4:  # scalar reads: four rows, eight columns
            for pitch in (t.a_pitch_by_columns, t.b_pitch):
                assert len({(row * pitch + column) % 32 for row in range(4) for column in range(8)}) == 32

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("l2_bytes", [10_000, 50 * 2**20])
    def test_tickets_cover_the_work_once_and_wait_for_smaller_ones(self, planner, shape, l2_bytes):
        made = plan(planner, shape, l2_bytes=l2_bytes)
        layers, rows, features, rank = shape
        schedule, tile = made.schedule, made.tiling.tile
        ticket = {schedule.item(t): t for t in range(schedule.items)}
        groups = list(itertools.product(range(layers), range(schedule.slabs)))
        expected = {
            ("convert", layer, 0, i) for layer in range(layers) for i in range(schedule.convert_items)
        }
        expected |= {("project", *group, i) for group in groups for i in range(schedule.project_items)}
        expected |= {("reduce", *group, i) for group in groups for i in range(schedule.reduce_items)}
        assert len(ticket) == schedule.items
        assert ticket.keys() == expected
        with pytest.raises(IndexError):
            schedule.item(schedule.items)

        # The items' tiles cover features, rows and both sides of the results.
        assert schedule.convert_items == -(-features // tile)
        assert schedule.reduce_items == -(-features // tile) + -(-rank // tile)
        assert made.slab_rows == schedule.project_items * tile
        assert (schedule.slabs - 1) * made.slab_rows < rows <= schedule.slabs * made.slab_rows

        def last(kind, layer, slab):
            return max(t for item, t in ticket.items() if item[:3] == (kind, layer, slab))

        for layer, slab in groups[:3] + groups[-3:]:
            convert, project = last("convert", layer, 0), last("project", layer, slab)
            assert convert < min(ticket["project", layer, slab, i] for i in range(schedule.project_items))
            first = min(ticket["reduce", layer, slab, i] for i in range(schedule.reduce_items))
            assert project < first
            assert slab == 0 or last("reduce", layer, slab - 1) < first

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("element", [2, 4])
    def test_rows_stay_in_l2_until_their_second_reading(self, planner, shape, element):
        made = plan(planner, shape, element)
        padded, schedule = made.tiling.padded, made.schedule
        held = (schedule.look_ahead + 1) * made.slab_rows * (shape[2] + padded) * element
        least = max(8 * padded, made.tiling.tile)
        assert held <= A100["l2_bytes"] / 2 or (
            made.slab_rows <= least + made.tiling.tile and schedule.look_ahead == 1
        )
        assert 1 <= schedule.look_ahead <= schedule.layers * schedule.slabs

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("element", [2, 4])
    def test_workspace(self, planner, shape, element):
        made = plan(planner, shape, element)
        layers, rows, features, _ = shape
        columns = made.tiling.padded * element
        schedule = made.schedule
        assert schedule.counters == 1 + layers + 2 * layers * schedule.slabs
        assert made.counter_bytes == 4 * schedule.counters
        assert 0 <= made.q_offset - made.counter_bytes < 256
        assert 0 <= made.p_offset - made.q_offset - layers * features * columns < 256
        assert made.workspace_bytes == made.p_offset + layers * rows * columns
        assert made.q_offset % 256 == made.p_offset % 256 == 0

    def test_counts_beyond_32_bits(self, planner):
        made = plan(planner, (1, 2**34, 8, 8))
        assert made.workspace_bytes > 2**34 * 32
        assert made.schedule.items < 2**30

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rank": 7}, "expected a rank from 8 to 256, got 7"),
            ({"rank": 257}, "expected a rank from 8 to 256, got 257"),
            ({"element": 8}, "expected elements of 2 or 4 bytes, got 8"),
            ({"rows": 0}, "expected layers and rows, got 2 and 0"),
            ({"layers": -1}, "expected layers and rows, got -1 and 100"),
            ({"features": 0}, "expected 1 to 2.30 features, got 0"),
            ({"features": 2**30 + 1}, "expected 1 to 2.30 features"),
            ({"capability": 75}, "expected compute capability 8.0 or newer, got 7.5"),
            ({"shared_per_block": 48 * 1024}, "bytes of shared memory for a block, the device has 49152"),
            ({"rows": 2**40}, "expected at most 2.30 tiles of work"),
            ({"layers": 2**60, "rows": 2**10}, "expected a problem within 64-bit offsets"),
        ],
    )
    def test_refusals(self, planner, changes, message):
        with pytest.raises(ValueError, match=message):
            plan(planner, (2, 100, 300, 64), **changes)

    def test_alignment(self, planner):
        def aligned(address=256, layers=2, rows=3, row_bytes=32, layer_bytes=96):
            return planner.aligned_for_vectors(
                address=address, layers=layers, rows=rows, row_bytes=row_bytes, layer_bytes=layer_bytes
            )

        assert aligned()
        assert not aligned(address=264)
        assert not aligned(row_bytes=40)
        assert not aligned(layer_bytes=104)
        assert aligned(rows=1, row_bytes=2)
        assert aligned(layers=1, layer_bytes=2)
        assert aligned(row_bytes=0)


class Machine(ctypes.Structure):
    _fields_ = [
        ("capability", ctypes.c_int),
        ("processors", ctypes.c_int),
        ("shared_per_block", ctypes.c_int64),
        ("shared_per_processor", ctypes.c_int64),
        ("l2_bytes", ctypes.c_int64),
    ]


class Call(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("x_bytes", ctypes.c_int64),
        ("misalignment", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("Q", "B", "Y", "c")),
        *((name, ctypes.c_int64) for name in ("layers", "rows", "features", "rank", "element")),
        *((name, ctypes.c_int64) for name in ("row_stride", "layer_stride")),
        ("machine", Machine),
        *((name, ctypes.c_int) for name in ("order", "resident", "eager", "refuse")),
        ("seed", ctypes.c_uint64),
    ]


FORWARD, REVERSE, SHUFFLED = range(3)


@pytest.fixture(scope="module")
def simulate(tmp_path_factory):
    """`simulate(x, Q, ...) -> (B, Y, c)`: the kernel's and launcher's source, run by the emulation."""
    library = tmp_path_factory.mktemp("simt") / "simt.so"
    simt, csrc = ROOT / "tests/support/simt", ROOT / "csrc"
    sources = [simt / "simt.cpp", simt / "driver.cpp", csrc / "planner.cpp", csrc / "lowrank_statistics.cu"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [compiler(), *flags, "-DDBPKERN_SIMT", f"-I{simt}", f"-I{csrc}", "-x", "c++"]
    subprocess.run([*command, *sources, "-o", library], check=True)
    entry = ctypes.CDLL(str(library)).simt_lowrank_statistics
    entry.restype = ctypes.c_char_p

    def run(x, Q, processors=4, l2_bytes=2**22, misalignment=0, capability=80, **schedule):
        L, n, d = x.shape
        r = Q.shape[2]
        B, Y, c = (torch.full(shape, torch.nan) for shape in ((L, r, r), (L, d, r), (L, d)))
        reach = (L - 1) * x.stride(0) + (n - 1) * x.stride(1) + d if x.numel() else 0
        machine = Machine(capability, processors, 163 * 1024, 164 * 1024, l2_bytes)
        options = {"order": FORWARD, "resident": 3, "eager": 0, "refuse": 0, "seed": 0, **schedule}
        call = Call(
            x=x.data_ptr(),
            x_bytes=reach * x.element_size(),
            misalignment=misalignment,
            **{name: t.data_ptr() for name, t in (("Q", Q), ("B", B), ("Y", Y), ("c", c))},
            **dict(zip(("layers", "rows", "features", "rank"), (L, n, d, r), strict=True)),
            element=x.element_size(),
            row_stride=x.stride(1),
            layer_stride=x.stride(0),
            machine=machine,
            **options,
        )
        error = entry(ctypes.byref(call))
        if error is not None:
            raise RuntimeError(error.decode())
        return B, Y, c

    return run


def sample(L, n, d, r, dtype, device="cpu"):
    """Rows with unequal variances and means, and an orthonormal Q."""
    x = torch.randn(L, n, d) * torch.linspace(0.2, 2, d) + torch.linspace(-0.5, 0.5, d)
    Q = torch.linalg.qr(torch.randn(L, d, max(r, 1)))[0] if r <= d else torch.randn(L, d, r)
    return x.to(device, dtype), Q.to(device).contiguous()


def exact(x, Q):
    n = x.shape[1]
    x, Q = x.double(), Q.double()
    P = x @ Q
    return P.mT @ P / n, x.mT @ P / n, x.square().mean(1)


def plain(x, Q):
    """PyTorch's results with the kernel's types: operands and P as x, sums and results in fp32."""
    n = x.shape[1]
    P = torch.bmm(x, Q.to(x.dtype)).float()
    x = x.float()
    return torch.bmm(P.mT, P) / n, torch.bmm(x.mT, P) / n, x.square().mean(1)


def check_precision(results, x, Q):
    """Error at most twice PyTorch's, plus 4 eps of the largest value; B symmetric to the bit."""
    for result, expected, usual in zip(results, exact(x, Q), plain(x, Q), strict=True):
        assert result.dtype == torch.float32
        assert result.shape == expected.shape
        error, allowed = ((t.double() - expected).abs().max() for t in (result, usual))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert torch.equal(results[0], results[0].mT)


DTYPES = [torch.bfloat16, torch.float32]
KERNEL_SHAPES = [
    (1, 1, 8, 8),
    (1, 2, 1, 8),  # more columns in Q than features
    (2, 67, 45, 17),
    (3, 131, 37, 8),
    (5, 7, 16, 16),
    (2, 64, 128, 32),
    (1, 300, 130, 64),
    (2, 70, 101, 100),
    (1, 129, 31, 31),
    (1, 70, 264, 256),
    (1, 33, 257, 129),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestKernel:
    @pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
    @pytest.mark.parametrize("processors", [1, 1000])  # the larger and the smaller tile
    def test_matches_fp64(self, simulate, shape, dtype, processors):
        x, Q = sample(*shape, dtype)
        check_precision(simulate(x, Q, processors=processors), x, Q)

    @pytest.mark.parametrize("processors", [1, 1000])
    def test_slabs_and_long_sums(self, simulate, dtype, processors):
        x, Q = sample(2, 1501, 19, 9, dtype)
        results = simulate(x, Q, processors=processors, l2_bytes=1000)
        check_precision(results, x, Q)
        assert not torch.equal(
            results[1], simulate(x, Q, processors=processors)[1]
        )  # other sums: slabs are in use
        check_precision(simulate(x, Q, processors=processors), x, Q)

    @pytest.mark.parametrize("shape", [(3, 150, 70, 17), (2, 300, 9, 8)], ids=str)
    @pytest.mark.parametrize("l2_bytes", [1000, 2**22])
    def test_no_schedule_changes_a_bit(self, simulate, shape, dtype, l2_bytes):
        x, Q = sample(*shape, dtype)
        expected = simulate(x, Q, l2_bytes=l2_bytes, resident=1)
        assert all(t.isfinite().all() for t in expected)
        orders = [(FORWARD, 4), (REVERSE, 1), (REVERSE, 4), (SHUFFLED, 2), (SHUFFLED, 4)]
        for seed, ((order, resident), eager) in enumerate(itertools.product(orders, (0, 1))):
            options = {"order": order, "eager": eager, "resident": resident, "seed": seed}
            results = simulate(x, Q, l2_bytes=l2_bytes, **options)
            assert all(map(torch.equal, results, expected)), options

    def test_layout_changes_no_bit(self, simulate, dtype):
        x, Q = sample(2, 75, 56, 24, dtype)
        expected = simulate(x, Q)
        wide = torch.full((2, 80, 61), torch.nan, dtype=dtype)
        wide[:, :75, :56] = x
        padded = torch.full((2, 75, 64), torch.nan, dtype=dtype)
        padded[..., :56] = x
        layouts = {
            "address": (x, dtype.itemsize),
            "odd strides": (wide[:, :75, :56], 0),
            "strides of whole vectors": (padded[..., :56], 0),
            "strides of whole vectors, address": (padded[..., :56], 8),
            "layers side by side": (x.transpose(0, 1).contiguous().transpose(0, 1), 0),
        }
        for name, (view, address) in layouts.items():
            assert torch.equal(view, x)
            assert all(map(torch.equal, simulate(view, Q, misalignment=address), expected)), name

    def test_vectors_that_end_beyond_the_features(self, simulate, dtype):
        x = torch.full((1, 40, 64), torch.nan, dtype=dtype)
        x[..., :53], Q = sample(1, 40, 53, 12, dtype)
        check_precision(simulate(x[..., :53], Q), x[..., :53], Q)

    def test_broadcast_rows_and_layers(self, simulate, dtype):
        x, Q = sample(1, 1, 40, 8, dtype)
        x, Q = x.expand(3, 20, 40), Q.expand(3, 40, 8).contiguous()
        check_precision(simulate(x, Q), x, Q)

    def test_a_layer_keeps_its_nans(self, simulate, dtype):
        x, Q = sample(3, 70, 40, 20, dtype)
        expected = simulate(x, Q)
        x[1, 3, 5] = torch.nan
        results = simulate(x, Q)
        for result, sound in zip(results, expected, strict=True):
            assert torch.equal(result[[0, 2]], sound[[0, 2]])
        B, Y, c = (t[1] for t in results)
        assert B.isnan().all()
        assert Y.isnan().all()
        assert c.isnan().nonzero().tolist() == [[5]]

    def test_failures_of_cuda_are_told(self, simulate, dtype):
        x, Q = sample(1, 5, 9, 8, dtype)
        with pytest.raises(RuntimeError, match="lowrank_statistics: launch: invalid argument"):
            simulate(x, Q, refuse=1)
        with pytest.raises(RuntimeError, match=r"expected compute capability 8\.0 or newer, got 7\.5"):
            simulate(x, Q, capability=75)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of a build for sm_80 and sm_90, and what nvcc printed."""
    try:
        folder = tmp_path_factory.mktemp("build") / "dbpkern"
        return folder, extension.build(folder, "8.0 9.0")[1]
    except extension.BuildError as error:
        require(str(error), "is missing" not in str(error))
        raise


class TestBuild:
    def test_kernels_do_not_spill(self, built, planner):
        rows = ahead.parse_ptxas(built[1])
        made = {(row["arch"], row["rows"], row["rank"], row["tile"]) for row in rows}
        kernels = set(itertools.product(["bf16", "fp32"], [16, 32, 64, 128, 256], [64, 128]))
        kernels -= {("fp32", 256, 128)}
        assert made == {(arch, *kernel) for arch in (80, 90) for kernel in kernels}
        assert len(rows) == len(made)
        for row in rows:
            assert row["spills"] == 0, row
            element = {"bf16": 2, "fp32": 4}[row["rows"]]
            tiling = planner.Tiling(element=element, padded=row["rank"], tile=row["tile"])
            # Registers are given out to warps by 256.
            warp = -(-row["registers"] * 32 // 256) * 256
            assert warp * tiling.threads // 32 * tiling.blocks_by_registers <= 65536, row

    def test_loads_in_a_new_process(self, built):
        program = """
import torch
from dbpkern import extension
print(extension.load().lowrank_statistics.default._schema, extension.why())
try:
    torch.ops.dbpkern_cuda.lowrank_statistics(torch.ones(1, 2, 8), torch.ones(1, 8, 8))
except NotImplementedError:
    print("CPU refused")
"""
        folder, _ = built
        assert [file.suffix for file in folder.iterdir()] == [".so"]
        environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder.parent), "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("DBPKERN_EXTENSION", None)
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
        schema = "dbpkern_cuda::lowrank_statistics(Tensor x, Tensor Q) -> (Tensor, Tensor, Tensor)"
        assert done.stdout.splitlines() == [f"{schema} a build for sm_80, sm_90", "CPU refused"]


@pytest.mark.gpu
class TestOnGPU:
    @pytest.fixture(scope="class")
    def ops(self):
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("the GPU is older than compute capability 8.0")
        require(f"a build of the extension ({extension.why()})", extension.load())
        return extension.load()

    @pytest.mark.parametrize("shape", [*KERNEL_SHAPES, (12, 1280, 768, 64), (2, 40001, 3072, 100)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_matches_fp64(self, ops, shape, dtype):
        x, Q = sample(*shape, dtype, "cuda")
        first, second = (ops.lowrank_statistics(x, Q) for _ in range(2))
        check_precision(first, x, Q)
        assert all(map(torch.equal, first, second))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_layouts(self, ops, dtype):
        x, Q = sample(3, 77, 56, 24, dtype, "cuda")
        expected = ops.lowrank_statistics(x, Q)
        wide = torch.full((3, 77, 61), torch.nan, dtype=dtype, device="cuda")
        wide[..., 3:59] = x
        for view in (wide[..., 3:59], x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)):
            assert all(map(torch.equal, ops.lowrank_statistics(view, Q.mT.contiguous().mT), expected))

    def test_cuda_graph(self, ops):
        x, Q = sample(4, 300, 96, 32, torch.bfloat16, "cuda")
        ops.lowrank_statistics(x, Q)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.lowrank_statistics(x, Q)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(map(torch.equal, captured, ops.lowrank_statistics(x, Q)))

    @pytest.mark.parametrize(
        ("x", "Q", "error", "message"),
        [
            ((5, 9), (1, 9, 8), ValueError, "x: expected shape"),
            ((1, 5, 9), (9, 8), ValueError, "Q: expected shape"),
            ((1, 5, 9), (2, 9, 8), ValueError, "with L = 1 and d = 9"),
            ((1, 5, 9), (1, 9, 7), ValueError, "expected a rank from 8 to 256, got 7"),
            ((1, 0, 9), (1, 9, 8), ValueError, "expected layers and rows, got 1 and 0"),
        ],
    )
    def test_refusals(self, ops, x, Q, error, message):
        with pytest.raises(error, match=message):
            ops.lowrank_statistics(torch.ones(x, device="cuda"), torch.ones(Q, device="cuda"))
        with pytest.raises(TypeError, match="x: expected bfloat16 or float32"):
            ops.lowrank_statistics(
                torch.ones(1, 5, 9, device="cuda").half(), torch.ones(1, 9, 8, device="cuda")
            )
