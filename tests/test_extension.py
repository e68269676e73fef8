"""The CUDA extension: its planner, its kernel's own source in an emulated GPU, its build and its loading.

Tests that need a C++ compiler, ninja or nvcc are skipped where that is missing, unless the environment
variable CI is set: then they fail. Those on a GPU need these only where there is no build yet.
"""

import ctypes
import errno
import importlib
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dbpkern import extension

ROOT = Path(__file__).parent.parent
ARCHITECTURES = ["8.0", "9.0"]

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


def require(*tools):
    """Skip, or fail in CI, where a tool that one of these looks for is missing."""
    try:
        for find in tools:
            find()
    except extension.ToolMissing as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI has every tool: {error}")
        pytest.skip(str(error))


@pytest.mark.parametrize("ci", ["", "true"])
def test_missing_tools_skip_but_fail_in_ci(monkeypatch, ci):
    def missing():
        raise extension.ToolMissing("ninja is missing: get it")

    monkeypatch.setenv("CI", ci)
    require(lambda: "nvcc")
    outcome = pytest.fail.Exception if ci else pytest.skip.Exception
    with pytest.raises(outcome, match="ninja is missing"):
        require(lambda: "nvcc", missing)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache of builds for these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield


@pytest.fixture(scope="module")
def planner(cache):
    require(extension._find_compiler)
    return extension.load_planner()


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

    @pytest.mark.parametrize("shape", [(0, 5, 9, 8), (3, 0, 9, 8), (0, 0, 1, 256)])
    def test_nothing_to_do(self, planner, shape):
        made = plan(planner, shape)
        assert (made.grid, made.workspace_bytes) == (0, 0)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"rank": 7}, "expected a rank from 8 to 256, got 7"),
            ({"rank": 257}, "expected a rank from 8 to 256, got 257"),
            ({"element": 8}, "expected elements of 2 or 4 bytes, got 8"),
            ({"rows": -1}, "expected layers and rows >= 0, got 2 and -1"),
            ({"features": 0}, "expected 1 to 2.30 features, got 0"),
            ({"features": 2**30 + 1}, "expected 1 to 2.30 features"),
            ({"capability": 75}, "expected compute capability 8.0 or newer, got 7.5"),
            ({"shared_per_block": 48 * 1024}, "bytes of shared memory for a block, the device has 49152"),
            ({"rows": 2**40}, "expected at most 2.30 tiles of work"),
            ({"layers": 2**60, "rows": 2**10}, "exceeds 64-bit offsets"),
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
    require(extension._find_compiler)
    library = tmp_path_factory.mktemp("simt") / "simt.so"
    simt, csrc = ROOT / "tests/simt", ROOT / "csrc"
    sources = [simt / "simt.cpp", simt / "driver.cpp", csrc / "planner.cpp", csrc / "lowrank_statistics.cu"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [extension._find_compiler(), *flags, "-DDBPKERN_SIMT", f"-I{simt}", f"-I{csrc}", "-x", "c++"]
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

    @pytest.mark.parametrize("shape", [(2, 0, 9, 8), (0, 4, 9, 8)])
    def test_no_rows_or_no_layers(self, simulate, shape, dtype):
        L, n, d, r = shape
        results = simulate(torch.empty(L, n, d, dtype=dtype), torch.randn(L, d, r))
        assert all(t.eq(0).all() for t in results)

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


@pytest.fixture
def undecided(monkeypatch, cache, tmp_path):
    """As in a new process, with an empty cache of builds and no variable set."""
    monkeypatch.setattr(extension, "_decision", None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    for name in ("DBPKERN_EXTENSION", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)


def pretend_gpus(monkeypatch, *capabilities):
    """GPUs that nothing but the choice of a build sees."""
    monkeypatch.setattr(extension, "_capabilities", lambda: sorted(capabilities))
    if torch.version.cuda is None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")


def stub_toolkit(monkeypatch, folder, script, release=None):
    """A CUDA toolkit whose nvcc is a shell script; ninja is the real one."""
    require(extension._find_ninja)
    release = release or torch.version.cuda.split(".")[0] + ".0"
    nvcc = folder / "toolkit/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    version = f'[ "$1" = --version ] && {{ echo "Cuda compilation tools, release {release}, V1"; exit 0; }}'
    nvcc.write_text(f"#!/bin/sh\n{version}\n{script}\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(folder / "toolkit"))


def pretend_build(*architectures, **changes):
    """A folder in the cache with the manifest of a build that fits, but for the changes."""
    folder = extension.cache_folder() / "build"
    folder.mkdir(parents=True)
    manifest = {**extension.fingerprint(), "architectures": architectures, **changes}
    (folder / "build.json").write_text(json.dumps(manifest))
    return folder


# Writes what it is asked for and keeps a record of its calls.
WORKING = (
    'while [ $# -gt 0 ]; do [ "$1" = -o ] && { echo > "$2"; echo "$2" >> "$CUDA_HOME/calls"; }; shift; done'
)


def refused(caplog, level, builds=False):
    """`load()` gives None with one log line of this level, after another if it `builds`; the reason."""
    with caplog.at_level(logging.DEBUG, logger="dbpkern"):
        assert extension.load() is None
        assert extension.load() is None
    *before, record = caplog.records
    expected = ["building the CUDA extension for 9.0, about half a minute"] if builds else []
    assert [r.getMessage() for r in before] == expected
    assert record.levelno == level
    assert "\n" not in record.getMessage()
    assert record.getMessage() == f"no CUDA extension, PyTorch serves: {extension.why()}"
    return extension.why()


@pytest.mark.usefixtures("undecided")
class TestLoading:
    def test_left_out_by_the_environment(self, monkeypatch, caplog):
        monkeypatch.setenv("DBPKERN_EXTENSION", "0")
        monkeypatch.setattr(extension, "_capabilities", lambda: pytest.fail("looked for GPUs"))
        assert refused(caplog, logging.INFO) == "DBPKERN_EXTENSION=0"

    def test_without_cuda(self, monkeypatch, caplog):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert refused(caplog, logging.INFO) == "this torch is built without CUDA"

    def test_without_gpu(self, monkeypatch, caplog):
        pretend_gpus(monkeypatch)
        assert refused(caplog, logging.INFO).startswith("there is no GPU")

    def test_with_old_gpus(self, monkeypatch, caplog):
        pretend_gpus(monkeypatch, (6, 1), (7, 5))
        expected = "the GPUs here have at most compute capability 7.5, 8.0 is needed"
        assert refused(caplog, logging.INFO) == expected

    def test_an_old_gpu_beside_others_is_left_out(self, monkeypatch):
        pretend_gpus(monkeypatch, (9, 0), (7, 5), (8, 0))
        built = []
        monkeypatch.setattr(extension, "_build_in_cache", lambda targets: built.append(targets) or Path("x"))
        monkeypatch.setattr(extension, "_open", lambda folder: extension._Decision("ops", str(folder)))
        assert extension.load() == "ops"
        assert [list(map(str, targets)) for targets in built] == [["8.0", "9.0"]]

    @pytest.mark.parametrize("named", [True, False])
    def test_an_old_gpu_leaves_no_build_unfit(self, monkeypatch, named):
        pretend_gpus(monkeypatch, (8, 6), (6, 1))
        monkeypatch.setattr(extension, "_open", lambda folder: extension._Decision("ops", str(folder)))
        folder = pretend_build("8.0")
        if named:
            monkeypatch.setenv("DBPKERN_EXTENSION", str(folder))
        assert extension.load() == "ops"
        assert extension.why() == str(folder)

    @pytest.mark.parametrize(
        ("where", "error", "reason"),
        [
            (
                "fcntl.flock",
                OSError(errno.ENOLCK, "No locks available"),
                "cannot lock {cache}: [Errno 37] No lo",
            ),
            ("sys.modules[fcntl]", None, "builds need file locks, which "),
            ("pathlib.Path.home", RuntimeError("no home"), "there is no home directory to keep builds in"),
            (
                "pathlib.Path.glob",
                PermissionError(13, "Permission denied"),
                "PermissionError: [Errno 13] Perm",
            ),
            ("dbpkern.extension._capabilities", RuntimeError("CUDA error\nmore"), "RuntimeError: CUDA error"),
            ("dbpkern.extension._find_ninja", AttributeError("no BIN_DIR"), "AttributeError: no BIN_DIR"),
            ("dbpkern.extension.fingerprint", ImportError(), "ImportError: "),
        ],
    )
    def test_any_failure_is_decided_once(self, monkeypatch, caplog, tmp_path, where, error, reason):
        calls = []

        def fail(*args, **kwargs):
            calls.append(args)
            raise error

        pretend_gpus(monkeypatch, (9, 0))
        stub_toolkit(monkeypatch, tmp_path, WORKING)
        cache = extension.cache_folder()
        if error is None:
            monkeypatch.setitem(sys.modules, "fcntl", None)
        else:
            monkeypatch.setattr(where, fail)
        if where.endswith("home"):
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert refused(caplog, logging.WARNING).startswith(reason.format(cache=cache))
        assert len(calls) == (error is not None)

    def test_a_build_that_vanishes(self, monkeypatch, caplog):
        pretend_gpus(monkeypatch, (9, 0))
        folder = pretend_build("9.0")
        monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
        fits = extension.mismatch

        def found_then_gone(folder, capabilities):
            reason = fits(folder, capabilities)
            (folder / "build.json").unlink()
            return reason

        monkeypatch.setattr(extension, "mismatch", found_then_gone)
        assert refused(caplog, logging.WARNING).startswith(f"the library in {folder} did not load: [Errno 2]")

    def test_without_nvcc(self, monkeypatch, caplog, tmp_path):
        pretend_gpus(monkeypatch, (9, 0))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert refused(caplog, logging.INFO).startswith("nvcc is missing: CUDA_HOME names")

    def test_without_ninja(self, monkeypatch, caplog, tmp_path):
        pretend_gpus(monkeypatch, (9, 0))
        stub_toolkit(monkeypatch, tmp_path, "exit 1")
        monkeypatch.setattr(extension.shutil, "which", lambda *args, **kwargs: None)
        monkeypatch.setattr(extension.importlib.util, "find_spec", lambda name: None)
        assert refused(caplog, logging.INFO).startswith("ninja is missing")

    def test_a_folder_named_ninja_is_no_ninja(self, monkeypatch, tmp_path):
        (tmp_path / "ninja").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "ninja", raising=False)
        monkeypatch.setattr(extension.shutil, "which", lambda *args, **kwargs: None)
        with pytest.raises(extension.ToolMissing, match="ninja is missing"):
            extension._find_ninja()
        del sys.modules["ninja"]

    def test_with_a_broken_compiler(self, monkeypatch, caplog, tmp_path):
        pretend_gpus(monkeypatch, (9, 0))
        stub_toolkit(monkeypatch, tmp_path, "echo some warning; echo nvcc fatal: out of order; exit 1")
        reason = refused(caplog, logging.WARNING, builds=True)
        assert "the build failed with status 1: nvcc fatal: out of order" in reason
        log = extension.cache_folder() / "failed.log"
        assert str(log) in reason
        assert "some warning" in log.read_text()
        assert sorted(f.name for f in extension.cache_folder().iterdir()) == [".lock", "failed.log"]

    def test_with_nvcc_of_another_cuda(self, monkeypatch, caplog, tmp_path):
        pretend_gpus(monkeypatch, (9, 0))
        stub_toolkit(monkeypatch, tmp_path, WORKING, release="5.5")
        expected = f"nvcc is of CUDA 5.5, torch of CUDA {torch.version.cuda}"
        assert refused(caplog, logging.WARNING) == expected

    def test_architectures_that_leave_out_the_gpu(self, monkeypatch, caplog):
        pretend_gpus(monkeypatch, (9, 0))
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 8.6")
        assert refused(caplog, logging.WARNING) == "TORCH_CUDA_ARCH_LIST leaves out compute capability 9.0"

    def test_a_folder_that_cannot_be_written(self, monkeypatch, caplog, tmp_path):
        pretend_gpus(monkeypatch, (9, 0))
        stub_toolkit(monkeypatch, tmp_path, WORKING)
        (tmp_path / "file").touch()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
        assert refused(caplog, logging.WARNING).startswith("cannot write to")

    def test_a_library_that_does_not_load(self, monkeypatch, caplog, tmp_path):
        pretend_gpus(monkeypatch, (9, 0))
        # "Builds" an empty library, and ptxas may say what it likes.
        stub_toolkit(
            monkeypatch, tmp_path, "echo \"Compiling entry function 'new' in new words\"\n" + WORKING
        )
        reason = refused(caplog, logging.WARNING, builds=True)
        assert reason.startswith("the library in")
        assert "did not load" in reason

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"torch": "2.0.0"}, "is of torch 2.0.0, this is"),
            ({"cuda": "11.8"}, "is of cuda 11.8, this is"),
            ({"sources": "0"}, "is of sources 0, this is"),
            ({"machine": "other"}, "is of machine other, this is"),
            ({"architectures": ["8.0"]}, "is for 8.0, a GPU here has 9.0"),
            ({"architectures": None}, "holds no build of the extension"),
        ],
    )
    @pytest.mark.parametrize("named", [True, False])
    def test_stale_builds_are_left_alone(self, monkeypatch, caplog, tmp_path, change, message, named):
        pretend_gpus(monkeypatch, (9, 0))
        monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        folder = pretend_build("9.0", **change)
        if named:
            monkeypatch.setenv("DBPKERN_EXTENSION", str(folder))
            assert message in refused(caplog, logging.WARNING)
        else:
            assert refused(caplog, logging.INFO).startswith("nvcc is missing")

    def test_a_fitting_build_is_loaded(self, monkeypatch, caplog):
        pretend_gpus(monkeypatch, (8, 6))
        loaded = []
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        folder = pretend_build("9.0", "8.0")
        with caplog.at_level(logging.INFO, logger="dbpkern"):
            assert extension.load() is torch.ops.dbpkern_cuda
            assert extension.load() is torch.ops.dbpkern_cuda
        assert loaded == [folder / "dbpkern_cuda.so"]
        assert [r.getMessage() for r in caplog.records] == [f"CUDA extension: {extension.why()}"]

    def test_threads_decide_once(self, monkeypatch, caplog):
        started = threading.Barrier(6)
        decisions = []

        def decide():
            decisions.append(threading.get_ident())
            return extension._Decision(None, "counted")

        monkeypatch.setattr(extension, "_decide", decide)
        threads = [threading.Thread(target=lambda: (started.wait(), extension.load())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(decisions) == 1

    def test_simultaneous_builds_make_one(self, monkeypatch, tmp_path):
        stub_toolkit(monkeypatch, tmp_path, "sleep 0.2\n" + WORKING)
        targets = [extension.Architecture(9, 0)]
        folders = []
        threads = [
            threading.Thread(target=lambda: folders.append(extension._build_in_cache(targets)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(folders) == 3
        assert len(set(folders)) == 1
        assert extension.mismatch(folders[0], [(9, 0)]) is None
        calls = (tmp_path / "toolkit/calls").read_text().split()
        assert sorted(calls) == ["bindings.o", "dbpkern_cuda.so", "lowrank_statistics.o", "planner.o"]


@pytest.mark.usefixtures("undecided")
class TestOutlook:
    """What `state` and `why` say before the first use: they build, load and decide nothing."""

    @pytest.fixture(autouse=True)
    def _passive(self, monkeypatch):
        if torch.version.cuda is None:
            monkeypatch.setattr(torch.version, "cuda", "13.0")
        for name in ("_decide", "_capabilities", "build", "_open"):
            monkeypatch.setattr(extension, name, lambda *args, name=name: pytest.fail(f"called {name}"))
        yield
        assert extension._decision is None

    def test_left_out(self, monkeypatch):
        monkeypatch.setenv("DBPKERN_EXTENSION", "0")
        assert (extension.state(), extension.why()) == ("not available", "DBPKERN_EXTENSION=0")

    def test_without_cuda(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert extension.state() == "not available"
        assert extension.why() == "this torch is built without CUDA"

    def test_not_built(self, monkeypatch, tmp_path):
        stub_toolkit(monkeypatch, tmp_path, "exit 1")
        assert extension.state() == "not built"
        nvcc = tmp_path / "toolkit/bin/nvcc"
        assert extension.why() == f"not used yet: the first use on a GPU builds it with {nvcc}"
        assert not extension.cache_folder().exists()

    @pytest.mark.parametrize("named", [True, False])
    def test_built(self, monkeypatch, named):
        folder = pretend_build("9.0")
        if named:
            monkeypatch.setenv("DBPKERN_EXTENSION", str(folder))
        assert extension.state() == "built"
        assert extension.why() == f"not used yet: the build in {folder} fits"

    def test_a_named_folder_without_a_build(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DBPKERN_EXTENSION", str(tmp_path))
        assert extension.state() == "not available"
        assert extension.why().startswith(f"{tmp_path} holds no build of the extension")

    def test_without_nvcc(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert extension.state() == "not available"
        assert extension.why().startswith("nvcc is missing")
        assert extension.nvcc_release() is None

    def test_failures_are_told(self, monkeypatch):
        def fail(*args):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "glob", fail)
        assert (extension.state(), extension.why()) == ("not available", "[Errno 13] Permission denied")

    def test_release_of_nvcc(self, monkeypatch, tmp_path):
        stub_toolkit(monkeypatch, tmp_path, "exit 1", release="13.7")
        assert extension.nvcc_release() == "13.7"


@pytest.mark.parametrize(("ops", "state"), [(object(), "loaded"), (None, "not available")])
def test_state_after_the_decision(monkeypatch, ops, state):
    monkeypatch.setattr(extension, "_decision", extension._Decision(ops, "because"))
    assert (extension.state(), extension.why()) == (state, "because")


@pytest.mark.usefixtures("undecided")
class TestHostCompiler:
    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        monkeypatch.setattr(extension.shutil, "which", lambda name: name if "g++" in name else None)

    @pytest.mark.parametrize(
        ("value", "compiler"),
        [
            ("g++-12", "g++-12"),
            ("ccache g++-12", "g++-12"),
            ("/usr/bin/sccache '/opt/my g++'", "/opt/my g++"),
        ],
    )
    def test_a_cache_before_it_is_left_out(self, monkeypatch, value, compiler):
        monkeypatch.setenv("CXX", value)
        assert extension._find_compiler() == compiler
        ninja = extension._ninja_file("nvcc", [extension.Architecture(9, 0)])
        assert ninja.count(extension.shlex.join([f"-ccbin={compiler}"])) == 4

    @pytest.mark.parametrize("value", ["", " ", "ccache"])
    def test_none_named(self, monkeypatch, value):
        monkeypatch.setenv("CXX", value)
        assert extension._find_compiler() == "g++"

    def test_refusals(self, monkeypatch):
        monkeypatch.setenv("CXX", "ccache g++ -m64")
        with pytest.raises(extension.BuildError, match="expected a compiler without options, got 'ccache g"):
            extension._find_compiler()
        monkeypatch.setenv("CXX", "icpx")
        with pytest.raises(extension.ToolMissing, match="CXX names icpx, which is not found"):
            extension._find_compiler()
        monkeypatch.delenv("CXX")
        monkeypatch.setattr(extension.shutil, "which", lambda name: None)
        with pytest.raises(extension.ToolMissing, match=r"install g\+\+, or set CXX"):
            extension._find_compiler()


@pytest.mark.usefixtures("undecided")
class TestArchitectures:
    @pytest.mark.parametrize(
        ("name", "runs", "refuses"),
        [
            ("8.0", [(8, 0), (8, 6), (8, 9)], [(9, 0), (7, 5)]),
            ("8.6", [(8, 6), (8, 9)], [(8, 0)]),
            ("9.0a", [(9, 0)], [(9, 1), (10, 0)]),
            ("10.0f", [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
            ("9.0+PTX", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
            ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ],
    )
    def test_what_runs_where(self, name, runs, refuses):
        architecture = extension.Architecture.parse(name)
        assert str(architecture) == name
        assert all(architecture.runs_on(capability) for capability in runs)
        assert not any(architecture.runs_on(capability) for capability in refuses)

    def test_flags(self):
        assert extension.Architecture.parse("9.0a").flags() == ["-gencode=arch=compute_90a,code=sm_90a"]
        assert extension.Architecture.parse("10.0+PTX").flags() == [
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_100,code=compute_100",
        ]

    @pytest.mark.parametrize("name", ["sm_90", "9", "9.0b", "90", "Kepler", "9.0+ptx", "+PTX"])
    def test_refuses_other_names(self, name):
        with pytest.raises(ValueError, match="expected a compute capability such as"):
            extension.architectures([name])

    def test_where_they_come_from(self, monkeypatch):
        def names(named=None):
            return [str(a) for a in extension.architectures(named)]

        pretend_gpus(monkeypatch, (9, 0), (8, 6))
        assert names() == ["8.6", "9.0"]
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0, 9.0+PTX")
        assert names() == ["8.0", "9.0+PTX"]
        assert names(["Ampere", "8.0"]) == ["8.0", "8.6"]
        monkeypatch.setenv(
            "TORCH_CUDA_ARCH_LIST", "Maxwell;Pascal;6.2;Volta+PTX;7.2;Turing;Ampere;Hopper+PTX"
        )
        assert names() == ["8.0", "8.6", "9.0+PTX"]
        with pytest.raises(ValueError, match=r"8\.0 or newer, got 7\.0\+PTX"):
            names(["Volta+PTX"])
        with pytest.raises(ValueError, match=r"expected compute capability 8\.0 or newer, got 7\.5"):
            names(["7.5"])
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ")
        pretend_gpus(monkeypatch)
        with pytest.raises(ValueError, match="no GPU found: name architectures"):
            names()


@pytest.mark.usefixtures("undecided")
class TestCommand:
    def test_no_architecture(self, monkeypatch, capsys):
        pretend_gpus(monkeypatch)
        assert extension.main([]) == 1
        assert "no GPU found: name architectures with --arch" in capsys.readouterr().err

    def test_no_nvcc(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert extension.main(["--arch", "9.0"]) == 1
        assert "nvcc is missing" in capsys.readouterr().err

    def test_other_folders_are_left_alone(self, monkeypatch, capsys, tmp_path):
        stub_toolkit(monkeypatch, tmp_path, WORKING)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine/thesis").touch()
        assert extension.main(["--arch", "9.0", "--out", str(tmp_path / "mine")]) == 1
        assert "holds something else" in capsys.readouterr().err
        assert (tmp_path / "mine/thesis").exists()

    def test_a_build_replaces_an_older_one(self, monkeypatch, tmp_path):
        stub_toolkit(monkeypatch, tmp_path, WORKING)
        folder = tmp_path / "out"
        for name in ("8.0", "9.0"):
            extension.build([extension.Architecture.parse(name)], folder)
            assert json.loads((folder / "build.json").read_text())["architectures"] == [name]
        assert sorted(f.name for f in folder.iterdir()) == ["build.json", "build.log", "dbpkern_cuda.so"]

    def test_a_file_in_the_place_of_the_folder(self, monkeypatch, capsys, tmp_path):
        stub_toolkit(monkeypatch, tmp_path, WORKING)
        (tmp_path / "file").touch()
        assert extension.main(["--arch", "9.0", "--out", str(tmp_path / "file")]) == 1
        assert "cannot build in" in capsys.readouterr().err

    def test_a_failed_build_without_a_home(self, monkeypatch, capsys, tmp_path):
        def fail():
            raise RuntimeError("Could not determine home directory.")

        stub_toolkit(monkeypatch, tmp_path, "echo nvcc fatal: out of order; exit 1")
        monkeypatch.setattr(Path, "home", fail)
        for name in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        assert extension.main(["--arch", "9.0", "--out", str(tmp_path / "out")]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == "the build failed with status 1: nvcc fatal: out of order"
        assert extension.main(["--arch", "9.0"]) == 1
        assert "set TORCH_EXTENSIONS_DIR" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ("Compiling entry function 'k' in new words", "ptxas said something else than expected of k"),
            ("", "ptxas named no kernel"),
        ],
    )
    def test_resources_that_cannot_be_read(self, monkeypatch, capsys, tmp_path, output, message):
        """A finished build serves, but is not called checked."""
        stub_toolkit(monkeypatch, tmp_path, f'echo "{output}"\n{WORKING}')
        monkeypatch.setattr(extension, "_open", lambda folder: extension._Decision("ops", "opened"))
        monkeypatch.setattr(torch.ops, "dbpkern_cuda", object(), raising=False)
        assert extension.main(["--arch", "9.0", "--check"]) == 1
        assert f"registers and spills are not known: {message}" in capsys.readouterr().err
        assert extension.main(["--arch", "9.0", "--out", str(tmp_path / "out")]) == 0
        printed = capsys.readouterr()
        assert message in printed.err
        assert printed.out == "opened\n"

    def test_spills_fail(self, monkeypatch, capsys, tmp_path):
        kernel = "_ZN7dbpkern6kernelINS_6ConfigI{}Li64ELi128EEEEEvNS_9ArgumentsE"
        output = "".join(
            f"ptxas info    : Compiling entry function '{kernel.format(name)}' for 'sm_90'\n"
            f"    {spilled} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads\n"
            "ptxas info    : Used 128 registers, used 1 barriers\n"
            for name, spilled in (("f", 8), ("NS_4Bf16E", 0))
        )
        stub_toolkit(monkeypatch, tmp_path, f"cat <<'END'\n{output}END\n{WORKING}")

        class Namespace:
            @staticmethod
            def shared_memory(element, padded, tile):
                return element * 10

        monkeypatch.setattr(extension, "_open", lambda folder: extension._Decision(Namespace, "opened"))
        monkeypatch.setattr(torch.ops, "dbpkern_cuda", Namespace, raising=False)
        assert extension.main(["--arch", "9.0", "--check"]) == 1
        printed = capsys.readouterr()
        assert "registers are spilled" in printed.err
        assert printed.out.splitlines()[1].split() == [
            "sm_90",
            "bf16",
            "64",
            "128",
            "128",
            "0",
            "0",
            "0",
            "20",
        ]
        with pytest.raises(extension.BuildError, match="something else than expected"):
            extension.parse_resources("Compiling entry function 'other' for 'sm_90'")


@pytest.fixture(scope="module")
def built(cache, tmp_path_factory):
    """Folder of a build for `ARCHITECTURES`, and what the command printed."""
    require(extension._find_nvcc, extension._find_ninja, extension._find_compiler)
    folder = tmp_path_factory.mktemp("build") / "out"
    command = [sys.executable, "-m", "dbpkern.extension", "--arch", *ARCHITECTURES, "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


class TestBuild:
    def test_kernels_do_not_spill(self, built, planner):
        folder, printed = built
        rows = extension.parse_resources((folder / "build.log").read_text())
        made = {(row["architecture"], row["element"], row["rank"], row["tile"]) for row in rows}
        kernels = set(itertools.product(["bf16", "fp32"], [16, 32, 64, 128, 256], [64, 128]))
        kernels -= {("fp32", 256, 128)}
        assert made == {(target, *kernel) for target in ("sm_80", "sm_90") for kernel in kernels}
        assert len(rows) == len(made)
        for row in rows:
            assert row["stack"] == row["spill_stores"] == row["spill_loads"] == 0, row
            element = {"bf16": 2, "fp32": 4}[row["element"]]
            tiling = planner.Tiling(element=element, padded=row["rank"], tile=row["tile"])
            # Registers are given out to warps by 256.
            warp = -(-row["registers"] * 32 // 256) * 256
            assert warp * tiling.threads // 32 * tiling.blocks_by_registers <= 65536, row
            expected = [*map(str, list(row.values())), str(tiling.shared_bytes)]
            assert expected in [line.split() for line in printed.splitlines()]

    def test_loads_in_a_new_process(self, built):
        folder, _ = built
        program = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from dbpkern import extension
ops = extension.load()
print(ops.lowrank_statistics.default._schema, extension.why())
try:
    ops.lowrank_statistics(torch.ones(1, 2, 8), torch.ones(1, 8, 8))
except NotImplementedError as error:
    print("CPU refused")
"""
        environment = {**os.environ, "DBPKERN_EXTENSION": str(folder), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        reason = f"{folder} serves, built for 8.0, 9.0"
        assert done.stderr.splitlines() == [f"INFO CUDA extension: {reason}"]
        schema = "dbpkern_cuda::lowrank_statistics(Tensor x, Tensor Q) -> (Tensor, Tensor, Tensor)"
        assert done.stdout.splitlines() == [f"{schema} {reason}", "CPU refused"]


@pytest.mark.gpu
class TestOnGPU:
    @pytest.fixture(scope="class")
    def ops(self):
        if torch.cuda.get_device_capability() < extension.MIN_CAPABILITY:
            pytest.skip("the GPU is older than compute capability 8.0")
        ops = extension.load()
        if ops is None:
            require(extension._find_nvcc, extension._find_ninja, extension._find_compiler)
            pytest.fail(extension.why())
        return ops

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

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_no_rows(self, ops, dtype):
        results = ops.lowrank_statistics(
            torch.empty(2, 0, 9, dtype=dtype, device="cuda"), torch.ones(2, 9, 8, device="cuda")
        )
        assert all(t.eq(0).all() for t in results)

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
        ],
    )
    def test_refusals(self, ops, x, Q, error, message):
        with pytest.raises(error, match=message):
            ops.lowrank_statistics(torch.ones(x, device="cuda"), torch.ones(Q, device="cuda"))
        with pytest.raises(TypeError, match="x: expected bfloat16 or float32"):
            ops.lowrank_statistics(
                torch.ones(1, 5, 9, device="cuda").half(), torch.ones(1, 9, 8, device="cuda")
            )
