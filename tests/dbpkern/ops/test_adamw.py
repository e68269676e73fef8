"""AdamW between the maps, in eager and by the kernels, against fp64 and PyTorch's own."""

import itertools

import pytest
import torch
from checks import as_good
from test_maps import (
    BACKENDS,
    DEVICE,
    FLOATS,
    GROUPS,
    factors,
    flattened,
    matrix,
    meta,
    mixed_layers,
    names,
    operand,
    rounded_deviation,
    small_tiles,  # noqa: F401
    tensor,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import ops, reference
from dbpkern.ops import _dispatch, _table, _triton
from dbpkern.ops._common import IMPLEMENTATIONS

RULE = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.05}

pytestmark = pytest.mark.usefixtures("poisoned")


def number(step):
    return torch.tensor(float(step), device=DEVICE)


def state(*shape, dtype=torch.float32, gradient=None):
    """V, its gradient and moments, as after a few steps."""
    g = tensor(*shape, dtype=gradient or dtype)
    return [
        tensor(*shape, dtype=dtype),
        g,
        0.3 * tensor(*shape, dtype=dtype),
        tensor(*shape, dtype=dtype) ** 2,
    ]


def peer(V, g, exp_avg, exp_avg_sq, own, step, dtype):
    """The step with operands of bf16 and sums of fp32; the products of a full R wait in bf16, too."""
    held = operand if len(own) == 1 else torch.clone
    g = g.float() + held(rounded_deviation(g.float(), own, True))
    exp_avg = exp_avg.float().lerp(g, 1 - RULE["beta1"]).to(dtype)
    exp_avg_sq = exp_avg_sq.float().lerp(g * g, 1 - RULE["beta2"]).to(dtype)
    m, v = exp_avg.float() / (1 - RULE["beta1"] ** step), exp_avg_sq.float() / (1 - RULE["beta2"] ** step)
    D = m / (v.sqrt() + RULE["eps"])
    change = D + held(rounded_deviation(D, own)) + RULE["weight_decay"] * V.float()
    return (V.float() - RULE["lr"] * change).to(dtype), exp_avg, exp_avg_sq


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "d", "r"), GROUPS)
def test_kernels(rows, d, r, dtype):
    own = [factors(d, r)] * 2 + [factors(d, r)]
    states = [state(o, d, dtype=dtype) for o in rows]
    old = [[t.clone() for t in ts] for ts in states]
    versions = [[t._version for t in ts] for ts in states]
    steps = [number(i) for i in (1, 7, 100)][: len(rows)]
    ops.adamw_(*map(list, zip(*states, strict=True)), steps, own[: len(rows)], **RULE, backend="triton")
    for found, ts, version, step, f in zip(states, old, versions, steps, own, strict=False):
        V, g, exp_avg, exp_avg_sq = [t.double() for t in ts]
        expected = reference.adamw(V, g, matrix(f), exp_avg, exp_avg_sq, int(step), *RULE.values())
        peers = peer(*ts, f, int(step), dtype)
        for actual, exact, other in zip([found[0], *found[2:]], expected, peers, strict=True):
            as_good(actual, exact, other)
        assert torch.equal(found[1], ts[1])
        changed = [t._version > v for t, v in zip(found, version, strict=True)]
        assert changed == [True, False, True, True]


@pytest.mark.parametrize("r", [0, 3])
def test_eager_is_AdamW_between_the_maps_but_for_the_decay(r):
    V = tensor(6, 2, 5, dtype=torch.float64).requires_grad_()
    own = [tuple(f.double() for f in factors(10, r))]
    lr, beta1, beta2, eps, weight_decay = RULE.values()
    optimizer = torch.optim.AdamW([V], lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0, foreach=False)
    found = V.detach().clone()
    moments = [torch.zeros_like(found), torch.zeros_like(found)]
    for step in range(1, 5):
        g = torch.randn_like(V)
        before = V.detach().clone()
        kept = ops.remember([before], own)
        V.grad = g.clone()
        ops.map_gradients_([V.grad], own)
        optimizer.step()
        with torch.no_grad():
            ops.map_changes_([V], kept, own)
            V -= lr * weight_decay * before
        old = [t.flatten(1).clone() for t in moments]
        ops.adamw_([found], [g], *([t] for t in moments), [number(step)], own, **RULE)
        expected = [V.detach(), *(optimizer.state[V][key] for key in ("exp_avg", "exp_avg_sq"))]
        exact = reference.adamw(before.flatten(1), g.flatten(1), matrix(own[0]), *old, step, *RULE.values())
        for actual, wanted, specified in zip([found, *moments], expected, exact, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
            torch.testing.assert_close(actual.flatten(1), specified, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_all_kinds_in_one_call(backend):
    """Full and low-rank R, gradients of another dtype, convolutions, and layouts that kernels do not know."""
    kinds = itertools.product([(20, 37), (8, 3, 2, 4), (9, 24)], FLOATS, [torch.float32, torch.bfloat16])
    states = [state(*shape, dtype=dtype, gradient=other) for shape, dtype, other in kinds]
    states.append([t.to(memory_format=torch.channels_last) for t in state(8, 3, 2, 4)])
    states.append([tensor(37, 20).T, *state(20, 37)[1:]])
    own = [
        factors(ts[0].shape[1:].numel(), r) for ts, r in zip(states, itertools.cycle([0, 3]), strict=False)
    ]
    old = [[t.double().flatten(1) for t in ts] for ts in states]
    steps = [number(3)] * len(states)
    ops.adamw_(*map(list, zip(*states, strict=True)), steps, own, **RULE, backend=backend)
    for found, (V, g, exp_avg, exp_avg_sq), f in zip(states, old, own, strict=True):
        expected = reference.adamw(V, g, matrix(f), exp_avg, exp_avg_sq, 3, *RULE.values())
        for actual, exact in zip([found[0], *found[2:]], expected, strict=True):
            error = (actual.flatten(1).double() - exact).abs().max() / exact.abs().max()
            assert error < (0.01 if actual.dtype == torch.bfloat16 or backend == "triton" else 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("r", [0, 4])
def test_the_rate_may_be_a_tensor_on_the_device(backend, r):
    found, own = state(9, 20), [factors(20, r)]
    expected = [t.clone() for t in found]
    for ts, lr in ((found, torch.tensor(0.1, device=DEVICE)), (expected, 0.1)):
        ops.adamw_(*([t] for t in ts), [number(2)], own, **{**RULE, "lr": lr}, backend=backend)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("r", [0, 4])
@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.9, 0.999999)])
def test_extreme_betas(r, betas):
    """Little is left of 1 - beta2 in fp32."""
    own = [factors(20, r)]
    V, g, _, _ = state(9, 20)
    moments = [torch.zeros_like(V), torch.zeros_like(V)]
    rule = {**RULE, "beta1": betas[0], "beta2": betas[1]}
    old = V.double()
    ops.adamw_([V], [g], *([m] for m in moments), [number(1)], own, **rule, backend="triton")
    zero = torch.zeros_like(old)
    exact, *_ = reference.adamw(old, g.double(), matrix(own[0]), zero, zero, 1, *rule.values())
    # The first step is one of signs, which rounding turns where the mapped gradient is next to nothing.
    assert ((V - exact).abs() < 2e-3).double().mean() > 0.95


@pytest.mark.parametrize("r", [0, 4])
def test_squares_that_fp16_cannot_hold(r):
    """The second moment is 0 as it is stored; the step is that of the one that is not."""
    own = [factors(20, r)]
    V, g, _, _ = state(9, 20, dtype=torch.float16)
    g *= 1e-3
    moments = [torch.zeros_like(V), torch.zeros_like(V)]
    old = V.double()
    ops.adamw_([V], [g], *([m] for m in moments), [number(1)], own, **RULE, backend="triton")
    zero = torch.zeros_like(old)
    exact, *_ = reference.adamw(old, g.double(), matrix(own[0]), zero, zero, 1, *RULE.values())
    assert ((V - exact).abs() < 5e-3).double().mean() > 0.9


def test_empty_lists_and_weights():
    ops.adamw_([], [], [], [], [], [], **RULE)
    for backend in BACKENDS:
        for shape, own in (((0, 4), factors(4, 0)), ((0, 4), factors(4, 2)), ((3, 0), factors(0, 0))):
            ops.adamw_(*([t] for t in state(*shape)), [number(1)], [own], **RULE, backend=backend)


# ---- launches


def test_launches_of_a_group():
    weights, own = mixed_layers(meta)
    steps, rule = [meta() for _ in weights], [torch.tensor(0.1), *list(RULE.values())[1:]]
    lists = (weights, *flattened(own), weights, weights, weights, steps)
    with _dispatch.assume((9, 0)), _triton.recording() as launches:
        IMPLEMENTATIONS["adamw_"](*lists, *rule, "triton")
    assert names(launches) == ["deviation_kernel", "adamw_kernel", "lowrank_adamw_kernel"]
    assert all(launch.constants["ALIGNED"] for launch in launches[1:])


def test_launches_on_fake_tensors(monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    _table._tables.clear()
    with FakeTensorMode(), _dispatch.assume((9, 0)), _triton.recording() as launches:
        weights, own = mixed_layers(lambda *shape: torch.empty(shape, device="cuda"))
        flat, sizes = flattened(own)
        steps = [torch.empty((), device="cuda") for _ in weights]
        for lr in (torch.tensor(0.1), torch.empty((), device="cuda")):
            IMPLEMENTATIONS["adamw_"](
                weights, flat, sizes, weights, weights, weights, steps, lr, 0.9, 0.99, 1e-8, 0.05, ""
            )
    assert names(launches) == ["deviation_kernel", "adamw_kernel", "lowrank_adamw_kernel"] * 2
    _table._tables.clear()


# ---- the operator


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    weights, own = mixed_layers(tensor)
    weights, own = weights[1:4], own[1:4]
    states = [state(*V.shape) for V in weights]
    weights, *others = map(list, zip(*states, strict=True))
    torch.library.opcheck(
        torch.ops.dbpkern.adamw_.default,
        (
            weights, *flattened(own), *others, [number(1)] * 3,
            torch.tensor(0.1), 0.9, 0.99, 1e-8, 0.05, backend,
        ),
    )  # fmt: skip


def test_flops_are_counted():
    states = [state(6, 4, 2), state(7, 9)]
    own = [factors(8, 0), factors(9, 2)]
    with FlopCounterMode(display=False) as counter:
        ops.adamw_(*map(list, zip(*states, strict=True)), [number(1)] * 2, own, **RULE)
    assert counter.get_total_flops() == 2 * (2 * 6 * 64 + 4 * 7 * 9 * 2 + 2 * 7 * 4)


def test_what_is_refused():
    V, g, exp_avg, exp_avg_sq = state(3, 4)
    own, step = [factors(4, 0)], number(1)

    def call(V=V, g=g, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, steps=(step,), lr=0.1, backend=None):
        rule = {**RULE, "lr": lr}
        ops.adamw_([V], [g], [exp_avg], [exp_avg_sq], steps, own, **rule, backend=backend)

    with pytest.raises(ValueError, match=r"gradients\[0\]: expected shape \[3, 4\], got \[4, 3\]"):
        call(g=g.T)
    with pytest.raises(TypeError, match=r"exp_avgs\[0\]: expected torch.float32, got torch.bfloat16"):
        call(exp_avg=exp_avg.bfloat16())
    with pytest.raises(ValueError, match="steps: expected one for each of 1 weights, got 0"):
        call(steps=())
    with pytest.raises(ValueError, match=r"steps\[0\]: expected shape \[\], got \[1\]"):
        call(steps=(step[None],))
    with pytest.raises(TypeError, match=r"steps\[0\]: expected torch.float32, got torch.float64"):
        call(steps=(step.double(),))
    with pytest.raises(ValueError, match="expected all tensors on one device"):
        call(steps=(meta(),))
    with pytest.raises(ValueError, match=r"lr: expected shape \[\], got \[1\]"):
        call(lr=torch.ones(1))
    with pytest.raises(ValueError, match="expected all tensors on one device"):
        call(g=meta(3, 4))
    with pytest.raises(ValueError, match="does not serve float64"):
        call(g=g.double(), backend="triton")


@pytest.mark.gpu
def test_steps_on_the_host_are_eager():
    V, g, exp_avg, exp_avg_sq = state(3, 4)
    with pytest.raises(ValueError, match="it reads the steps on the weights' device"):
        ops.adamw_(
            [V], [g], [exp_avg], [exp_avg_sq], [torch.tensor(1.0)], [factors(4, 0)], **RULE, backend="triton"
        )
    ops.adamw_([V], [g], [exp_avg], [exp_avg_sq], [torch.tensor(1.0)], [factors(4, 0)], **RULE)
