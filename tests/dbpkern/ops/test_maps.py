"""The maps around a step, in eager and by the kernels, against fp64."""

import itertools

import pytest
import torch
from checks import as_good
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import ops, reference
from dbpkern.ops import _dispatch, _table, _triton
from dbpkern.ops._common import IMPLEMENTATIONS
from dbpkern.ops._dispatch import Tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["eager", "triton"]
# (rows of each weight, d, r or 0 for a full R): one of each, primes, less than a block, several blocks, no
# rows.
GROUPS = [
    ((1,), 1, 0),
    ((5, 40), 37, 0),
    ((33, 0, 16), 32, 0),
    ((1,), 1, 1),
    ((5, 40), 37, 7),
    ((33, 0, 16), 48, 16),
]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that small matrices have several."""
    monkeypatch.setattr(_dispatch, "tiles", lambda *_: Tiles(16, 16, 16, 4, 2))


def tensor(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def factors(d, r):
    """A full R near the identity for r = 0, otherwise Q and S."""
    if not r:
        return (torch.eye(d, device=DEVICE) + 0.1 * tensor(d, d) / d**0.5,)
    return torch.linalg.qr(tensor(d, r)).Q.contiguous(), 0.3 * tensor(r, r)


def matrix(own, dtype=torch.float64):
    own = [f.to(dtype) for f in own]
    return own[0] if len(own) == 1 else reference.lowrank_matrix(*own)


def operand(x):
    return x.bfloat16().float()


def rounded_deviation(x, own, transposed=False):
    """`x (R - I)` with operands of bf16 and sums of fp32."""
    own = [*own[:-1], own[-1].mT] if transposed else own
    if len(own) == 1:
        return operand(x) @ operand(own[0] - torch.eye(len(own[0]), device=DEVICE))
    Q, S = map(operand, own)
    return operand(operand(operand(x) @ Q) @ S) @ Q.mT


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "d", "r"), GROUPS)
def test_gradients(rows, d, r, dtype):
    gradients = [tensor(o, d, dtype=dtype) for o in rows]
    own = [factors(d, r)] * 2 + [factors(d, r)]
    found = [g.clone() for g in gradients]
    versions = [g._version for g in found]
    ops.map_gradients_(found, own[: len(rows)], backend="triton")
    for g, mapped, version, f in zip(gradients, found, versions, own, strict=False):
        exact = reference.map_gradient(g.double(), matrix(f))
        as_good(mapped, exact, (g.float() + rounded_deviation(g.float(), f, True)).to(dtype))
        assert mapped._version > version


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "d", "r"), GROUPS)
def test_changes(rows, d, r, dtype):
    before = [tensor(o, d, dtype=dtype) for o in rows]
    weights = [b + 0.1 * tensor(*b.shape, dtype=dtype) for b in before]
    own = [factors(d, r)] * 2 + [factors(d, r)]
    found = [V.clone() for V in weights]
    kept = ops.remember(before, own[: len(rows)], backend="triton")
    ops.map_changes_(found, kept, own[: len(rows)], backend="triton")
    for V, b, mapped, f in zip(weights, before, found, own, strict=False):
        exact = reference.map_change(V.double(), b.double(), matrix(f))
        as_good(mapped, exact, (V.float() + rounded_deviation(V.float() - b.float(), f)).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_all_kinds_in_one_call(backend):
    """Full and low-rank R, several widths and dtypes, convolutions, and layouts that kernels do not know."""
    shapes = [(20, 37), (8, 3, 2, 4), (9, 24), (17, 6, 2, 2), (7, 5)]
    weights = [tensor(*shape, dtype=dtype) for shape, dtype in itertools.product(shapes, FLOATS)]
    weights += [
        tensor(8, 3, 2, 4).to(memory_format=torch.channels_last),
        tensor(37, 20).T,
        tensor(12, 2 * 24)[:, ::2],
        tensor(12, 50)[:, 1:38],
    ]
    own = [factors(V.shape[1:].numel(), r) for V, r in zip(weights, itertools.cycle([0, 3]), strict=False)]
    own[0] = (own[0][0].T.contiguous().T,)  # a view of an R
    before = [(V.float() + 0.1 * tensor(*V.shape)).to(V.dtype) for V in weights]
    mapped = [V.clone(memory_format=torch.preserve_format) for V in weights]
    mapped[-2] = tensor(12, 2 * 24)[:, ::2].copy_(weights[-2])
    gradients = [V.clone(memory_format=torch.preserve_format) for V in weights]
    ops.map_changes_(mapped, ops.remember(before, own, backend=backend), own, backend=backend)
    ops.map_gradients_(gradients, own, backend=backend)
    for V, b, g, m, f in zip(weights, before, gradients, mapped, own, strict=True):
        flat = V.flatten(1)
        tolerance = {"rtol": 0, "atol": 0.03 if V.dtype == torch.bfloat16 or backend == "triton" else 5e-3}
        expected = reference.map_gradient(flat.double(), matrix(f))
        torch.testing.assert_close(g.flatten(1).double(), expected, **tolerance)
        expected = reference.map_change(flat.double(), b.flatten(1).double(), matrix(f))
        torch.testing.assert_close(m.flatten(1).double(), expected, **tolerance)


@pytest.mark.parametrize("r", [0, 3])
def test_eager_in_fp64(r):
    V, before = tensor(6, 9, dtype=torch.float64), tensor(6, 9, dtype=torch.float64)
    own = tuple(f.double() for f in factors(9, r))
    g = V.clone()
    ops.map_gradients_([g], [own])
    torch.testing.assert_close(g, reference.map_gradient(V, matrix(own)), rtol=0, atol=1e-13)
    expected = reference.map_change(V, before, matrix(own))
    ops.map_changes_([V], ops.remember([before], [own]), [own])
    torch.testing.assert_close(V, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_change_keeps_its_digits(backend):
    """`V Q` less the old one leaves enough of them, in fp32 and with three TF32 products for one."""
    V, own = tensor(40, 256), factors(256, 16)
    moved = V + 1e-4 * tensor(40, 256)
    kept = ops.remember([V], [own], backend=backend)
    found = moved.clone()
    ops.map_changes_([found], kept, [own], backend=backend)
    expected = reference.map_change(moved.double(), V.double(), matrix(own)) - V
    assert (found - V - expected).norm() < 1e-2 * expected.norm()
    Q, S = (f.double() for f in own)
    change = (tf32_product(moved, own[0]) - tf32_product(V, own[0])) @ S @ Q.mT
    exact = (moved.double() - V.double()) @ Q @ S @ Q.mT
    assert (change - exact).norm() < 1e-2 * exact.norm()


def tf32_product(a, b):
    """`a b` as three products of operands rounded to TF32."""

    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    (a, a_rest), (b, b_rest) = ((tf32(x), tf32(x - tf32(x))) for x in (a, b))
    return ((a_rest @ b + a @ b_rest) + a @ b).double()


def test_a_small_change_in_fp64():
    V, own = tensor(6, 90, dtype=torch.float64), tuple(f.double() for f in factors(90, 8))
    moved = V + 1e-4 * torch.randn_like(V)
    kept = ops.remember([V], [own])
    expected = reference.map_change(moved, V, matrix(own))
    ops.map_changes_([moved], kept, [own])
    assert (moved - expected).norm() < 1e-12 * V.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_remembered(backend):
    weights = [
        tensor(8, 3, 2, 4),
        tensor(5, 37),
        tensor(9, 37, dtype=torch.bfloat16),
        tensor(12, 50)[:, 1:38],
    ]
    own = [factors(24, 0), factors(37, 7), factors(37, 7), factors(37, 0)]
    kept = ops.remember(weights, own, backend=backend)
    for V, f, found in zip(weights, own, kept, strict=True):
        assert found.dtype == (V.dtype if len(f) == 1 else torch.float32)
        torch.testing.assert_close(found, V if len(f) == 1 else V.float() @ f[0], rtol=0, atol=1e-5)
    assert ops.remember([], []) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("r", [0, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_what_did_not_change_keeps_its_bits(backend, r, dtype):
    V, own = tensor(20, 37, dtype=dtype), factors(37, r)
    found = V.clone()
    ops.map_changes_([found], ops.remember([V], [own], backend=backend), [own], backend=backend)
    assert torch.equal(found, V)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("r", [0, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_identity_changes_no_bit(backend, r, dtype):
    own = (torch.eye(37, device=DEVICE),) if not r else (factors(37, r)[0], torch.zeros(r, r, device=DEVICE))
    g = tensor(20, 37, dtype=dtype)
    kept = ops.remember([tensor(20, 37, dtype=dtype)], [own], backend=backend)
    for change in (
        lambda x: ops.map_gradients_([x], [own], backend=backend),
        lambda x: ops.map_changes_([x], kept, [own], backend=backend),
    ):
        found = g.clone()
        change(found)
        assert torch.equal(found, g)


@pytest.mark.parametrize("r", [0, 3])
def test_rows_far_apart(r):
    # Pages that nobody touches take no memory.
    torch.use_deterministic_algorithms(False)  # or torch.empty would fill them all
    for stride in (2**22 + 64, 2**27):  # the second is beyond the reach of a kernel
        g = torch.empty(300 * 2**22 if stride < 2**23 else 17 * stride, dtype=torch.bfloat16, device=DEVICE)
        g = g.as_strided((290 if stride < 2**23 else 17, 5), (stride, 1))
        g.copy_(torch.randn(g.shape))
        own, old = factors(5, r), g.clone()
        ops.map_gradients_([g], [own], backend="triton")
        exact = reference.map_gradient(old.double(), matrix(own))
        as_good(g, exact, (old.float() + rounded_deviation(old.float(), own, True)).bfloat16())


def test_empty_lists_and_weights():
    ops.map_gradients_([], [])
    ops.map_changes_([], ops.remember([], []), [])
    for backend in BACKENDS:
        for shape, own in (((0, 4), factors(4, 0)), ((0, 4), factors(4, 2)), ((3, 0), factors(0, 0))):
            V = tensor(*shape)
            ops.map_gradients_([V], [own], backend=backend)
            ops.map_changes_([V], ops.remember([V], [own], backend=backend), [own], backend=backend)


def test_ranks_beyond_the_kernels_are_eager():
    g, own = tensor(9, 140), factors(140, 130)
    found = g.clone()
    ops.map_gradients_([found], [own], backend="triton")
    torch.testing.assert_close(found, reference.map_gradient(g, matrix(own, torch.float32)))


# ---- launches


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def names(launches):
    return [launch.kernel.__name__ for launch in launches]


def mixed_layers(make):
    """Three weights of one width with full R, two of them sharing one, and three with Q and S."""
    shared = (make(32, 32),)
    weights = [make(40, 32), make(40, 32), make(16, 32), make(48, 16), make(48, 16), make(16, 16)]
    own = [shared, shared, (make(32, 32),), *((make(16, 8), make(8, 8)) for _ in range(3))]
    return weights, own


def flattened(own):
    return [f for t in own for f in t], [len(t) for t in own]


def test_launches_of_a_group():
    weights, own = mixed_layers(meta)
    with _dispatch.assume((9, 0)), _triton.recording() as launches:
        IMPLEMENTATIONS["map_"](weights, *flattened(own), [], "triton")
    assert names(launches) == ["deviation_kernel", "map_kernel", "lowrank_map_kernel"]
    assert len(launches[0].args["deviation"]) == 2
    assert launches[2].grid == (7,)
    assert all(launch.constants["ALIGNED"] for launch in launches[1:])


def test_launches_on_fake_tensors(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    _table._tables.clear()

    def cuda(*shape):
        return torch.empty(shape, device="cuda")

    with FakeTensorMode(), _dispatch.assume((9, 0)), _triton.recording() as launches:
        weights, own = mixed_layers(cuda)
        flat, sizes = flattened(own)
        IMPLEMENTATIONS["map_"](weights, flat, sizes, [], "")
        made = len(_table._tables)
        IMPLEMENTATIONS["map_"](weights, flat, sizes, [], "")
        assert len(_table._tables) == made
        kept = [*map(torch.empty_like, weights[:3]), *(cuda(len(V), 8) for V in weights[3:])]
        IMPLEMENTATIONS["remember"](weights, flat, sizes, kept, "")
        IMPLEMENTATIONS["map_"](weights, flat, sizes, kept, "")
    maps = ["deviation_kernel", "map_kernel", "lowrank_map_kernel"]
    assert names(launches) == [*maps, *maps, "remember_kernel", *maps]
    _table._tables.clear()


@pytest.mark.gpu
def test_tables_in_a_graph():
    weights = [tensor(20, 32), tensor(5, 32)]
    own = [factors(32, 0), factors(32, 4)]
    expected = [V.clone() for V in weights]
    for _ in range(2):
        ops.map_gradients_(expected, own)
    graph = torch.cuda.CUDAGraph()
    old = [V.clone() for V in weights]
    ops.map_gradients_(weights, own)  # compiles
    with torch.cuda.graph(graph):
        ops.map_gradients_(weights, own)
    _table._tables.clear()
    for V, start in zip(weights, old, strict=True):
        V.copy_(start)
    graph.replay()
    graph.replay()
    assert all(map(torch.equal, weights, expected))


# ---- the operators


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    weights, own = mixed_layers(tensor)
    flat, sizes = flattened(own)
    torch.library.opcheck(torch.ops.dbpkern.map_.default, (weights, flat, sizes, [], backend))
    kept = ops.remember(weights, own)
    torch.library.opcheck(torch.ops.dbpkern.remember.default, (weights, flat, sizes, kept, backend))
    torch.library.opcheck(torch.ops.dbpkern.map_.default, (weights, flat, sizes, kept, backend))


def test_flops_are_counted():
    weights, own = [tensor(6, 4, 2), tensor(7, 9)], [factors(8, 0), factors(9, 2)]
    with FlopCounterMode(display=False) as counter:
        ops.map_gradients_(weights, own)
        ops.map_changes_(weights, ops.remember(weights, own), own)
    assert counter.get_total_flops() == 2 * (2 * 6 * 64 + 4 * 7 * 9 * 2 + 2 * 7 * 4) + 2 * 7 * 9 * 2


@pytest.mark.parametrize(
    ("weights", "own", "error", "match"),
    [
        ([tensor(3)], [factors(3, 0)], ValueError, r"gradients\[0\]: expected shape \[o, ...\], got \[3\]"),
        ([tensor(3, 4).int()], [factors(4, 0)], TypeError, r"gradients\[0\]: expected float16"),
        ([tensor(3, 4)], [], ValueError, "factors: expected one for each of 1 gradients, got 0"),
        ([tensor(3, 4)], [()], ValueError, r"factors\[0\]: expected \(R,\) or \(Q, S\), got 0 tensors"),
        ([tensor(3, 4)], [factors(5, 0)], ValueError, r"R: expected shape \[d, d\] with d = 4, got \[5, 5\]"),
        ([tensor(3, 4)], [factors(5, 2)], ValueError, r"Q: expected shape \[d, r\] with d = 4, got \[5, 2\]"),
        (
            [tensor(3, 4)],
            [(factors(4, 2)[0], tensor(3, 3))],
            ValueError,
            r"S: expected shape \[r, r\] with r = 2, got",
        ),
        ([tensor(3, 4)], [(meta(4, 4),)], ValueError, "expected all tensors on one device, got cpu, meta"),
    ],
)
def test_what_is_refused(weights, own, error, match):
    with pytest.raises(error, match=match):
        ops.map_gradients_(weights, own)


def test_what_changes_refuse():
    V, own = tensor(3, 4), [factors(4, 0)]
    with pytest.raises(ValueError, match="before: expected one for each of 1 weights, got 0"):
        ops.map_changes_([V], [], own)
    with pytest.raises(ValueError, match=r"before\[0\]: expected shape \[3, 4\], got \[4, 3\]"):
        ops.map_changes_([V], [V.T], own)
    with pytest.raises(TypeError, match=r"before\[0\]: expected torch.float32, got torch.float64"):
        ops.map_changes_([V], [V.double()], own)
    with pytest.raises(ValueError, match="does not serve float64"):
        ops.map_gradients_([V.double()], own, backend="triton")
    with pytest.raises(ValueError, match="it serves R of float32"):
        ops.map_gradients_([V], [(own[0][0].bfloat16(),)], backend="triton")
    with pytest.raises(ValueError, match="backend: expected None or one of"):
        ops.map_gradients_([V], own, backend="cublas")
