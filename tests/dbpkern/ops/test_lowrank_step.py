"""`lowrank_step_` against fp64 and against the full rule: PyTorch's algebra, and the Triton kernels."""

import sys

import pytest
import torch
from checks import computes_on_fakes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import ops, reference
from dbpkern.ops import _dispatch, _triton
from dbpkern.ops._common import IMPLEMENTATIONS

module = sys.modules["dbpkern.ops.lowrank_step"]

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # numpy's, on statistics that are broken on purpose
    pytest.mark.filterwarnings("default::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOUBLE = torch.float64
NAN, INF = float("nan"), float("inf")
KAPPAS = [0.0, 0.3, 1.0]
# (L, n, d, r): more, fewer and as many rows as ranks, one of each, primes, r = d.
SHAPES = [
    (1, 1, 1, 1),
    (1, 1, 7, 3),
    (3, 5, 13, 5),
    (2, 13, 5, 5),
    (5, 2, 17, 11),
    (7, 17, 11, 3),
    (1, 40, 37, 19),
    (0, 4, 3, 2),
]
# The plain rule, at a rate that nothing changes.
PLAIN = {"scale_free": False, "limit": None}


def factors(L, d, r, dtype=DOUBLE, size=0.3):
    """Orthonormal Q, and an S that is not symmetric."""
    Q = torch.linalg.qr(torch.randn(L, d, r, dtype=DOUBLE)).Q.contiguous()
    S = size * torch.randn(L, r, r, dtype=DOUBLE)
    return Q.to(DEVICE, dtype), S.to(DEVICE, dtype)


def correlated(L, n, d, dtype=DOUBLE):
    """Rows whose features are correlated, differently in each layer."""
    x = torch.randn(L, n, d, dtype=DOUBLE) @ (torch.eye(d) + 0.3 * torch.randn(L, d, d, dtype=DOUBLE))
    return x.to(DEVICE, dtype)


def state(L, n, d, r, dtype=DOUBLE):
    """Q, S and caution, and the statistics of n rows."""
    Q, S = factors(L, d, r)
    caution = torch.linspace(0.25, 1, L, dtype=DOUBLE, device=DEVICE)
    found = (Q, S, caution, *reference.lowrank_statistics(correlated(L, n, d), Q))
    return tuple(t.to(dtype) for t in found)


def step(Q, S, caution, B, Y, c, eta, kappa=0.0, *, dtype=None, **options):
    """What the op makes of copies: Q, S, caution and rates, as the reference returns them."""
    Q, S, caution, B, Y, c = (t.to(dtype or t.dtype, copy=True) for t in (Q, S, caution, B, Y, c))
    rates = torch.full_like(caution, NAN)
    ops.lowrank_step_([(Q, S, caution, rates, B, Y, c)], eta, kappa, **options)
    return Q, S, caution, rates


def moved(Q, S, x, eta, kappa=0.0, **options):
    """Step Q and S in place by rows."""
    caution = torch.ones_like(S[:, 0, 0])
    statistics = ops.lowrank_statistics(x, Q)
    ops.lowrank_step_([(Q, S, caution, torch.zeros_like(caution), *statistics)], eta, kappa, **options)


def exact(found, expected, tolerance=1e-10):
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def as_good(found, truth, peers):
    """Errors at most twice those of PyTorch in fp32, and 4 units in the last place of the largest value."""
    for actual, expected, peer in zip(found, truth, peers, strict=True):
        if expected.numel():
            error, other = ((t.double() - expected).abs().max() for t in (actual, peer))
            allowed = 2 * other + 4 * torch.finfo(actual.dtype).eps * expected.abs().max()
            assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"  # false for NaN


RULES = [
    {},
    {"kappa": 0.3},
    {"kappa": 1.0, "limit": 0.01},
    {"scale_free": False},
    {"kappa": 0.3, "scale_free": False, "limit": None},
    {"limit": 1e-3},
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("L", "n", "d", "r"), SHAPES)
def test_values(L, n, d, r, rule):
    given = state(L, n, d, r)
    q_eta = 0.2 if n >= 2 * r else 0.02  # few rows have their subspace far away
    expected = reference.lowrank_step(*given, 0.02, q_eta=q_eta, **rule)
    found = step(*given, 0.02, q_eta=q_eta, **rule)
    exact(found, expected)
    exact([found[0].mT @ found[0]], [torch.eye(r, dtype=DOUBLE, device=DEVICE).expand(L, r, r)])


@pytest.fixture
def parts(monkeypatch):
    """Several programs a layer, of few features each, and products in several pieces: as wide layers have."""
    monkeypatch.setattr(module, "BLOCK_D", 16)
    monkeypatch.setattr(module, "BLOCK_H", 16)
    monkeypatch.setattr(_dispatch, "processors", lambda _: 5)


@pytest.mark.parametrize("rule", range(0, len(RULES), 2))
def test_triton_serves_stacks_of_every_width_and_rank(parts, rule):
    """One call for three widths and two ranks, as many ranks as features, and a stack without layers."""
    given = [state(*shape) for shape in ((2, 60, 53, 8), (1, 60, 37, 24), (1, 20, 8, 8), (0, 5, 19, 8))]
    found = {}
    for backend in ("triton", "eager"):
        stacks = [[t.float() for t in (*g[:3], torch.full_like(g[2], NAN), *g[3:])] for g in given]
        ops.lowrank_step_(stacks, 0.02, backend=backend, **RULES[rule])
        found[backend] = stacks
    for one, other, g in zip(found["triton"], found["eager"], given, strict=True):
        as_good(one[:4], reference.lowrank_step(*g, 0.02, **RULES[rule]), other[:4])


@pytest.mark.parametrize(("n", "d", "r"), [(100, 50, 32), (5, 40, 16)])
def test_triton_is_deterministic_and_close(parts, n, d, r):
    """Also with several pieces of ranks, and fewer rows than ranks."""
    given = state(1, n, d, r)
    truth = reference.lowrank_step(*given, 0.02, 0.3, q_eta=0.02)
    found, again = (
        step(*given, 0.02, 0.3, q_eta=0.02, dtype=torch.float32, backend="triton") for _ in range(2)
    )
    assert all(map(torch.equal, found, again))
    # The condition of B, 1e4 where it is singular, times fp32's eps.
    exact([t.double() for t in found], truth, 1e-4)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_rates_of_every_kind(parts, backend):
    given = state(2, 20, 17, 8, torch.float32)
    for eta in (0.125, torch.tensor(0.125, dtype=DOUBLE), torch.tensor(0.125, device=DEVICE)):
        found = step(*given, eta, backend=backend, **PLAIN)
        torch.testing.assert_close(found[3], 0.125 * given[2])
    exact(found, reference.lowrank_step(*given, 0.125, **PLAIN), 1e-4)


def test_what_the_kernels_cannot_serve_is_left_to_eager(parts, monkeypatch):
    """Ranks that are no multiples of 8, another dtype, and strides, beside a stack that they serve."""
    monkeypatch.setattr(_dispatch, "preferred", lambda *_: "triton")
    odd, wide, fits = (
        state(2, 20, 9, 3, torch.float32),
        state(1, 20, 17, 8),
        state(1, 20, 17, 8, torch.float32),
    )
    strided = [t.clone() for t in fits]
    strided[0] = strided[0].mT.contiguous().mT
    stacks = [[*(t.clone() for t in g[:3]), torch.zeros_like(g[2]), *g[3:]] for g in (odd, wide, fits)]
    stacks.append([*strided[:3], torch.zeros_like(fits[2]), *strided[3:]])
    called = []
    monkeypatch.setattr(module, "triton_step", lambda stacks, *rule: called.extend(stacks))
    ops.lowrank_step_(stacks, 0.1)
    assert [stack[0].data_ptr() for stack in called] == [stacks[2][0].data_ptr()]
    for stack, g in zip(stacks, (odd, wide, None, fits), strict=True):
        if g is not None:
            exact(stack[:4], reference.lowrank_step(*g, 0.1), 1e-4)


# What the mathematics asks for.


@pytest.mark.parametrize("kappa", KAPPAS)
def test_S_follows_the_full_rule_inside_the_subspace(kappa):
    """`T - eta Q^T M Q T` with M of all d features, formed from z itself."""
    x, (Q, S) = correlated(3, 40, 9), factors(3, 9, 4)
    M, *_ = reference.correlation(reference.lowrank_transform(x, Q, S), kappa)
    expected = S - 0.05 * Q.mT @ M @ Q @ (torch.eye(4, device=DEVICE) + S)
    before = Q.clone()
    moved(Q, S, x, 0.05, kappa, q_eta=0.0, **PLAIN)
    exact((Q, S), (before, expected))


@pytest.mark.parametrize("start", ["identity", "random"])
@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize(
    ("dtype", "backend", "steps", "tolerance"),
    [(DOUBLE, "eager", 20, 1e-12), (torch.float32, "eager", 20, 1e-5)],
)
def test_at_full_rank_it_is_the_full_update(dtype, backend, steps, tolerance, kappa, n, start):
    d = 12
    Q, S = factors(1, d, d, dtype, size=0.0)
    R = torch.eye(d, dtype=dtype, device=DEVICE)[None].clone()
    if start == "identity":
        Q = R.clone()
    first = Q.clone()
    for _ in range(steps):
        x = correlated(1, n, d, dtype)
        R = reference.update(R, reference.transform(x, R), 0.02, kappa)
        moved(Q, S, x, 0.02, kappa, backend=backend, **PLAIN)
        exact([reference.lowrank_matrix(Q, S)], [R], tolerance)
    assert (R - torch.eye(d, device=DEVICE)).abs().max() > 1e-3 * steps
    assert (Q - first).abs().max() > 1e-3 * steps


def test_nothing_but_the_variances_knows_the_scale():
    x, (Q, S) = correlated(2, 30, 9), factors(2, 9, 3)
    found = []
    for scale in (1, 1e4):
        q, s = Q.clone(), S.clone()
        moved(q, s, scale * x, 0.1)
        found.append((q, s))
    exact(*found)
    assert (found[0][0] - Q).abs().max() > 0.01
    assert (found[0][1] - S).abs().max() > 0.01


@pytest.mark.parametrize("n", [3, 12, 200])
def test_S_keeps_its_singular_values_while_Q_turns(n):
    """New samples shake Q at every step. Were S projected instead of turned, R would fade to the identity."""
    Q, S = factors(2, 32, 6)
    before, start = torch.linalg.svdvals(S), Q.clone()
    for _ in range(50):
        moved(Q, S, torch.randn(2, n, 32, dtype=DOUBLE, device=DEVICE), 0.0)
    exact([torch.linalg.svdvals(S)], [before], 1e-6)
    assert torch.linalg.svdvals(start.mT @ Q).min() < 0.9


@pytest.mark.parametrize(
    ("backend", "n", "spread"),
    [*(("eager", n, spread) for n in (1, 7, 16, 100) for spread in (0.0, 1.0, 3.0)), ("triton", 4, 3.0)],
)
def test_Q_stays_orthonormal_and_finite(backend, n, spread):
    """Singular statistics, eigenvalues that span seven orders of magnitude, fp32."""
    # Triton's interpreter takes its time.
    d, r, steps = (32, 8, 5) if backend == "triton" and DEVICE == "cpu" else (64, 16, 200)
    Q, S = factors(1, d, r, torch.float32, size=0.0)
    scale = torch.arange(1, d + 1, device=DEVICE) ** (-spread * 2)
    start, eye = Q.clone(), torch.eye(r, device=DEVICE)
    for _ in range(steps):
        moved(Q, S, torch.randn(1, n, d, device=DEVICE) * scale, 0.05, backend=backend)
        assert (Q.mT @ Q - eye).abs().max() < 1e-5
    assert S.isfinite().all()
    assert (Q - start).abs().max() > 0.05


def loss_of(R, C):
    """Decorrelation loss for inputs of second moment C."""
    G = R.double() @ C @ R.double().mT
    return ((G - torch.diag(G.diagonal())).square().sum() / G.numel()).item()


@pytest.mark.parametrize("n", [64, 320])
def test_spiked_inputs_are_decorrelated_nearly_as_well_as_can_be(n):
    """Against the R that whitens the true leading eigenvectors; 320 rows: a tenth of 64 images' 50 tokens."""
    d, r = 128, 4
    U = torch.linalg.qr(torch.randn(d, 8, dtype=DOUBLE)).Q
    C = torch.eye(d, dtype=DOUBLE) + 20 * U @ U.mT  # the identity and directions of greater variance
    values, vectors = torch.linalg.eigh(C)
    top, rest = values[-r:], values[:-r].mean()
    ideal = reference.lowrank_matrix(vectors[:, -r:], torch.diag((rest / top).sqrt() - 1))
    Q, S = factors(1, d, r, torch.float32, size=0.0)
    root = torch.linalg.cholesky(C).float()
    for _ in range(400):
        moved(Q, S, (torch.randn(1, n, d) @ root.mT).to(DEVICE), 5e-3, **PLAIN)
    ratio = loss_of(reference.lowrank_matrix(Q, S)[0].cpu(), C) / loss_of(ideal, C)
    assert 0.99 < ratio <= 1.2
    assert loss_of(torch.eye(d), C) / loss_of(ideal, C) > 1.9


# Layers without evidence, or with evidence of something else.

BACKENDS = [("eager", DOUBLE, 1e-9), ("triton", torch.float32, 1e-4)]


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_layers_without_rows_stay_as_they_are(parts, backend, dtype, tolerance):
    given = state(3, 20, 16, 8, dtype)
    for part in given[3:]:
        part[1] = 0
    expected = reference.lowrank_step(*given, 0.1, 0.5)
    found = step(*given, 0.1, 0.5, backend=backend)
    exact(found, expected, tolerance)
    for actual, before in zip(found[:3], given[:3], strict=True):
        assert torch.equal(actual[1], before[1])
    assert not torch.equal(found[1][0], given[1][0])


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_a_layer_whose_rows_are_not_finite_rests_with_more_caution(parts, backend, dtype, tolerance, value):
    given = state(3, 20, 16, 8, dtype)
    x = torch.randn(3, 20, 16, dtype=dtype, device=DEVICE)
    x[1, 4, 2] = value
    given = *given[:3], *ops.lowrank_statistics(x, given[0], backend=backend)
    expected = reference.lowrank_step(*given, 0.1, 0.3)
    found = step(*given, 0.1, 0.3, backend=backend)
    exact(found, expected, tolerance)
    assert torch.equal(found[0][1], given[0][1])
    assert torch.equal(found[1][1], given[1][1])
    assert torch.equal(found[2], given[2] * torch.tensor([1, 0.5, 1], dtype=dtype, device=DEVICE))
    assert found[3][1] == 0


BROKEN = {
    "indefinite B": lambda B, Y: B[1].neg_(),
    "NaN in B": lambda B, Y: B[1].fill_(NAN),
    "NaN in Y": lambda B, Y: Y[1, 2].fill_(NAN),
    "infinite Y": lambda B, Y: Y[1].fill_(INF),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)
def test_a_layer_that_cannot_be_factorised_keeps_its_Q_and_harms_no_other(
    parts, backend, dtype, tolerance, case
):
    given = state(3, 20, 16, 8, dtype)
    expected = reference.lowrank_step(*given, 0.1)
    BROKEN[case](*given[3:5])
    found = step(*given, 0.1, backend=backend)
    for actual, wanted in zip(found, expected, strict=True):
        exact([actual[0::2]], [wanted[0::2]], tolerance)
    assert torch.equal(found[0][1], given[0][1])
    assert not torch.equal(found[1][1], given[1][1])  # S itself takes the step, or the NaN


# How it runs.


def test_what_changes_keeps_its_address_and_raises_its_version():
    Q, S, caution, *statistics = state(2, 9, 5, 2)
    changed = (Q, S, caution, torch.zeros_like(caution))
    before = [(t.data_ptr(), t._version) for t in changed]
    ops.lowrank_step_([(*changed, *statistics)], 0.1)
    for t, (address, version) in zip(changed, before, strict=True):
        assert t.data_ptr() == address
        assert t._version > version


def test_eager_serves_any_strides():
    given = state(3, 15, 13, 5)
    views = [torch.stack([t, torch.full_like(t, NAN)], -1)[..., 0] for t in given]
    rates = torch.zeros_like(given[2])
    ops.lowrank_step_([(*views[:3], rates, *views[3:])], 0.1)
    exact((*views[:3], rates), reference.lowrank_step(*given, 0.1))


@computes_on_fakes
def test_three_launches_of_a_rank_on_a_gpu(monkeypatch):
    """The runs of a ViT-B with a decoder: an empty one, and two ranks."""
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    sizes = [(36, 768, 64), (0, 768, 64), (12, 3072, 64), (6, 512, 48), (2, 2048, 64), (1, 64, 3)]
    with FakeTensorMode(), _dispatch.assume((9, 0)), _triton.recording() as launches:
        shapes = [((L, d, r), (L, r, r), (L,), (L,), (L, r, r), (L, d, r), (L, d)) for L, d, r in sizes]
        stacks = [[torch.empty(shape, device="cuda") for shape in stack] for stack in shapes]
        lists = [list(column) for column in zip(*stacks, strict=True)]
        IMPLEMENTATIONS["lowrank_step_"](*lists, torch.tensor(0.1), 0.0, True, 0.5, 0.2, "")
    names = ["moved_kernel", "small_kernel", "turn_kernel"]
    assert [launch.kernel.__name__ for launch in launches] == 2 * names
    assert launches[1].grid == (36 + 12 + 2,)
    assert launches[0].grid <= (132,)  # one program on a processor


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_no_product_of_eager_is_shortened(precision, monkeypatch):
    setting, bmm, seen = (
        getattr(torch.backends, "cuda" if DEVICE == "cuda" else "mkldnn").matmul,
        torch.bmm,
        [],
    )
    monkeypatch.setattr(torch, "bmm", lambda *a: seen.append(setting.fp32_precision) or bmm(*a))
    torch.set_float32_matmul_precision(precision)
    try:
        step(*state(2, 9, 6, 3, torch.float32), 0.1, 0.3, backend="eager")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert len(seen) > 10
    assert set(seen) <= {"ieee", "none"}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_S_keeps_its_size_on_a_gpu(backend):
    Q, S = factors(2, 64, 16, torch.float32)
    before = torch.linalg.svdvals(S)
    for _ in range(300):
        moved(Q, S, torch.randn(2, 100, 64, device="cuda"), 0.0, backend=backend)
    torch.testing.assert_close(torch.linalg.svdvals(S), before, rtol=1e-3, atol=1e-4)


def test_it_never_reads_a_value():
    given = state(2, 9, 6, 2)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step(*given, 0.1, 0.5, backend="eager")
    names = {event.name for event in recorded.events()}
    assert "aten::linalg_cholesky_ex" in names
    assert not {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::equal"} & names


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("backend", "dtype"), [("", DOUBLE), ("triton", torch.float32)])
def test_opcheck(backend, dtype):
    Q, S, caution, *statistics = state(1, 20, 17, 8, dtype)
    lists = [[t] for t in (Q, S, caution, torch.zeros_like(caution), *statistics)]
    rule = (torch.tensor(0.1), 0.3, True, None, 0.2, backend)
    torch.library.opcheck(torch.ops.dbpkern.lowrank_step_.default, (*lists, *rule))


def test_autocast_and_compilation_change_nothing():
    given = state(2, 9, 6, 3, torch.float32)
    plain = step(*given, 0.1, 0.3)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(map(torch.equal, step(*given, 0.1, 0.3), plain))

    def call(Q, S, caution, rates, *statistics):
        ops.lowrank_step_([(Q, S, caution, rates, *statistics)], 0.1, 0.3)

    copies = [t.clone() for t in given]
    copies.insert(3, torch.zeros_like(given[2]))
    torch.compile(call, fullgraph=True, backend="aot_eager")(*copies)
    assert all(map(torch.equal, copies[:4], plain))


def test_flops_are_those_of_products_and_factorisations():
    L, d, r = 2, 64, 4
    given = state(L, 4 * d, d, r)
    with FlopCounterMode(display=False) as counter:
        step(*given, 0.1)
    total = counter.get_total_flops()
    rule = (torch.tensor(0.1), 0.0, True, 0.5, 0.2)
    with FlopCounterMode(display=False) as counter:  # it knows no factorisations
        module._eager_step(*given[:3], torch.zeros_like(given[2]), *given[3:], *rule)
    # Four triangular solves of d rows and three Cholesky factorisations.
    assert total - counter.get_total_flops() == L * (4 * d * r**2 + r**3)


REFUSALS = [
    (
        {"Q": lambda g: g["Q"].half(), "S": lambda g: g["S"].half()},
        TypeError,
        "Q: expected float32 or float64",
    ),
    ({"Q": lambda g: g["Q"].mT}, ValueError, r"Q: expected shape \[2, 3, 3\], got \[2, 3, 5\]"),
    ({"S": lambda g: g["S"][:, :2, :2]}, ValueError, r"S: expected shape \[2, 3, 3\], got \[2, 2, 2\]"),
    ({"S": lambda g: g["S"].double()}, TypeError, "equal dtypes"),
    ({"caution": lambda g: g["c"]}, ValueError, r"caution: expected shape \[2\]"),
    ({"rates": lambda g: g["rates"][:1]}, ValueError, r"rates: expected shape \[2\], got \[1\]"),
    ({"B": lambda g: g["B"][:1]}, ValueError, r"B: expected .* \[2, 3, 3\], got \[1, 3, 3\]"),
    ({"Y": lambda g: g["Y"].mT}, ValueError, r"Y: expected .* \[2, 5, 3\], got \[2, 3, 5\]"),
    ({"c": lambda g: g["c"].double()}, TypeError, "equal dtypes, got .* c torch.float64"),
    ({"c": lambda g: g["c"][:, :1]}, ValueError, r"c: expected shape \[2, 5\], got \[2, 1\]"),
    ({"B": lambda g: g["B"].to("meta")}, ValueError, "one device, got .* B on meta"),
    *(({"eta": eta}, ValueError, "eta: expected a finite") for eta in (-1, NAN, INF)),
    ({"eta": torch.ones(2)}, ValueError, r"eta: expected a number or a 0-d tensor, got \[2\]"),
    *(({"kappa": kappa}, ValueError, "kappa: expected") for kappa in (-1, 2, NAN)),
    *(({"limit": limit}, ValueError, "limit: expected") for limit in (0, -1, NAN, INF)),
    *(({"q_eta": q_eta}, ValueError, "q_eta: expected") for q_eta in (-0.1, 1.1, NAN)),
    ({"backend": "fast"}, ValueError, "backend: expected None or one of"),
    ({"backend": "cuda"}, ValueError, "lowrank_step_: no backend 'cuda'; there are eager, triton"),
    ({"backend": "triton", "Q": lambda g: g["Q"].mT.contiguous().mT}, ValueError, "it needs contiguous Q"),
]


@pytest.mark.parametrize(("changes", "error", "match"), REFUSALS, ids=[f"{m[:40]}" for *_, m in REFUSALS])
def test_refusals_say_why_and_touch_nothing(changes, error, match):
    Q, S, caution, B, Y, c = state(2, 9, 5, 3, torch.float32)
    given = {"Q": Q, "S": S, "caution": caution, "rates": caution.clone(), "B": B, "Y": Y, "c": c, "eta": 0.1}
    before = Q.clone(), S.clone(), caution.clone()
    changed = {name: change(given) if callable(change) else change for name, change in changes.items()}
    given |= changed
    stack = tuple(given.pop(name) for name in ("Q", "S", "caution", "rates", "B", "Y", "c"))
    with pytest.raises(error, match=match):
        ops.lowrank_step_([stack], **given)
    assert all(map(torch.equal, (Q, S, caution), before))


@pytest.mark.parametrize("r", [3, 12, 136])
def test_triton_says_what_it_cannot_serve(r):
    with pytest.raises(ValueError, match=f"ranks that are multiples of 8 up to 128, got {r}"):
        step(*state(1, 3, 140, r, torch.float32), 0.1, backend="triton")
    with pytest.raises(ValueError, match="it does not serve float64"):
        step(*state(1, 3, 9, 8), 0.1, backend="triton")
