"""What keeps decorrelation stable: the limiter, the scale-free step, cadence, schedules, caution."""

import copy

import pytest
import torch
from rules import decor_sgd
from timm.scheduler import CosineLRScheduler
from torch import nn
from vits import decorrelated, mlp

from dbpkern import reference
from dbpkern.stacks import eigenvalue_bound, scale_free_

D = 24


def one_layer(d=D, dtype=torch.float64, **options):
    """A model of one layer; its R is that of the stream it sees."""
    torch.manual_seed(0)
    return mlp(d, 4, dtype=dtype, form="fold", **options)


def ill_conditioned(n, d=D, condition=1e6, dtype=torch.float64, seed=0):
    """Rows `[n, d]` whose second moment has eigenvalues from 1 down to 1 / condition, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=dtype)).Q
    scales = torch.logspace(0, -torch.log10(torch.tensor(condition)).item() / 2, d, dtype=dtype)
    return torch.randn(n, d, generator=generator, dtype=dtype) * scales @ basis.T


def feed(model, decor, x):
    model(x).square().mean().backward()
    decor.step()
    model.zero_grad()


def R_of(model):
    (layer,) = decorrelated(model).values()
    return layer.R


def correlations(z):
    """The correlation coefficients of the features of z, not centred."""
    G = z.T @ z / len(z)
    scale = G.diagonal().rsqrt()
    return G * scale[:, None] * scale


def rms_of_correlations(z):
    return float(correlations(z).fill_diagonal_(0).square().mean().sqrt())


# The limiter.


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 64)])
def test_the_bound_is_above_the_largest_eigenvalue(shape):
    L, d = shape
    M = torch.randn(L, d, d, dtype=torch.float64)
    M = M + M.mT
    largest = torch.linalg.eigvalsh(M).abs().amax(1)
    bound = eigenvalue_bound(M)
    assert (bound >= largest * (1 - 1e-12)).all()
    assert (bound <= torch.linalg.matrix_norm(M) * (1 + 1e-12)).all()


@pytest.mark.parametrize("n", [400, D // 2])  # M formed, and bounded through the smaller Gram matrix
@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_no_step_exceeds_the_limit(n, kappa):
    limit, eta = 0.3, 5.0
    model = one_layer()
    decor = decor_sgd(model, eta=eta, kappa=kappa, sample=1.0, limit=limit)
    for step in range(5):
        x = ill_conditioned(n, seed=step) * 3
        before = R_of(model).clone()
        M, _, _ = reference.correlation(reference.transform(x, before)[None], kappa)
        feed(model, decor, x)
        (rate,) = decor.engine.rates().values()
        largest = torch.linalg.eigvalsh(M[0]).abs().max()
        assert 0 < rate * largest <= limit * (1 + 1e-9)
        assert rate < eta
        torch.testing.assert_close(R_of(model), before - rate * M[0] @ before, rtol=1e-10, atol=1e-12)


def test_a_rate_below_the_limit_is_left_alone():
    plain, limited = one_layer(), one_layer()
    decors = decor_sgd(plain, eta=1e-3, limit=None, sample=1.0), decor_sgd(limited, eta=1e-3, sample=1.0)
    for step in range(3):
        for model, decor in zip((plain, limited), decors, strict=True):
            feed(model, decor, ill_conditioned(100, seed=step))
    torch.testing.assert_close(R_of(limited), R_of(plain), rtol=1e-12, atol=1e-14)
    assert float(next(iter(decors[1].engine.rates().values()))) == pytest.approx(1e-3, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ill_conditioned_stream_diverges_without_and_converges_with_the_limiter(dtype):
    def after(limit, scale_free, eta, steps):
        """Root mean square of the correlations left, and the largest entry of R."""
        model = one_layer(dtype=dtype)
        decor = decor_sgd(model, eta=eta, sample=1.0, limit=limit, scale_free=scale_free)
        for step in range(steps):
            feed(model, decor, 10 * ill_conditioned(256, dtype=dtype, seed=step))
        z = reference.transform(10 * ill_conditioned(4096, dtype=dtype, seed=-1), R_of(model))
        return rms_of_correlations(z.double()), float(R_of(model).abs().max())

    assert not after(None, False, 0.1, 60)[1] <= 1e6  # or not finite
    left, largest = after(0.5, True, 0.1, 400)
    assert left < 0.1 < 0.3 < rms_of_correlations(ill_conditioned(4096, seed=-1))
    assert largest < 1e3


# The scale-free step.


def test_scale_free_divides_by_the_mean_squares_of_both_features():
    z = torch.randn(2, 50, 6, dtype=torch.float64)
    z[1, :, 3] = 0
    M, a, _ = reference.correlation(z, kappa=0.25)
    found = scale_free_(M.clone(), a)
    for layer, i, j in ((0, 0, 1), (0, 5, 2), (1, 4, 4)):
        expected = M[layer, i, j] / (a[layer, i] + a[layer, j])
        torch.testing.assert_close(found[layer, i, j], expected)
    assert (found[1, 3, 3] == 0).all()  # no variance, no direction to go
    assert found.isfinite().all()


def test_scale_free_steps_do_not_depend_on_the_scale():
    results = []
    for scale in (1.0, 1e-3):
        model = one_layer()
        decor = decor_sgd(model, eta=0.05, sample=1.0, scale_free=True)
        for step in range(20):
            feed(model, decor, scale * ill_conditioned(100, condition=100, seed=step))
        results.append(R_of(model).clone())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_near_a_diagonal_correlations_shrink_by_eta_whatever_the_variances():
    eta = 0.1
    scales = torch.tensor([10.0, 1.0, 0.01], dtype=torch.float64)
    L = torch.linalg.cholesky(torch.eye(3, dtype=torch.float64) + 1e-4 * (1 - torch.eye(3)))
    x = torch.linalg.qr(torch.randn(200, 3, dtype=torch.float64)).Q * 200**0.5 @ L.T * scales
    model = one_layer(3)
    decor = decor_sgd(model, eta=eta, sample=1.0, scale_free=True)
    before = correlations(x)
    feed(model, decor, x)
    after = correlations(reference.transform(x, R_of(model)))
    off = ~torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(after[off], (1 - eta) * before[off], rtol=1e-2, atol=0)


def test_without_it_small_variances_stall():
    def left(scale_free, eta):
        model = one_layer()
        decor = decor_sgd(model, eta=eta, sample=1.0, scale_free=scale_free)
        for step in range(200):
            feed(model, decor, 0.03 * ill_conditioned(200, condition=10, seed=step))
        z = reference.transform(0.03 * ill_conditioned(4000, condition=10, seed=-1), R_of(model))
        return correlations(z).fill_diagonal_(0).square().sum().sqrt()

    assert left(True, 0.05) < 0.3 * left(False, 0.05)


def test_scale_free_low_rank_steps_do_not_depend_on_the_scale():
    results = []
    for scale in (1.0, 1e-2):
        model = one_layer(rank=6)
        decor = decor_sgd(model, eta=0.05, sample=1.0, scale_free=True)
        for step in range(20):
            feed(model, decor, scale * ill_conditioned(100, condition=100, seed=step))
        (layer,) = decorrelated(model).values()
        results.append(layer.dense_R())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


def test_low_rank_steps_stay_below_the_limit():
    model = one_layer(rank=6)
    decor = decor_sgd(model, eta=100.0, sample=1.0, limit=0.5)
    for step in range(100):
        feed(model, decor, 10 * ill_conditioned(100, seed=step))
    (layer,) = decorrelated(model).values()
    assert layer.dense_R().isfinite().all()
    assert layer.dense_R().abs().max() < 100
    assert float(next(iter(decor.engine.rates().values()))) < 1.0


# Cadence.


def test_every_third_step_updates_with_three_times_the_rate():
    model, alone = one_layer(), one_layer()
    sparse = decor_sgd(model, eta=0.01, sample=1.0, every=3)
    dense = decor_sgd(alone, eta=0.03, sample=1.0)
    for step in range(7):
        x = ill_conditioned(64, condition=10, seed=step)
        before = R_of(model).clone()
        feed(model, sparse, x)
        if step % 3:
            assert torch.equal(R_of(model), before)
        else:
            feed(alone, dense, x)
            torch.testing.assert_close(R_of(model), R_of(alone), rtol=1e-12, atol=1e-14)


def test_between_updates_nothing_is_sampled(monkeypatch):
    model = one_layer()
    decor = decor_sgd(model, eta=0.01, every=2)
    (site,) = decor.engine.sites
    drawn = []
    take = site.slot.layer.take_rows
    monkeypatch.setattr(site.slot.layer, "take_rows", lambda *a: drawn.append(step) or take(*a))
    for step in range(4):
        feed(model, decor, ill_conditioned(64, seed=step))
    assert drawn == [0, 2]


def test_cadence_survives_a_checkpoint():
    straight = one_layer()
    decor = decor_sgd(straight, eta=0.01, every=3)
    for step in range(8):
        feed(straight, decor, ill_conditioned(64, seed=step))
    model = one_layer()
    decor = decor_sgd(model, eta=0.01, every=3)
    for step in range(4):
        feed(model, decor, ill_conditioned(64, seed=step))
    saved = copy.deepcopy((model.state_dict(), decor.state_dict()))
    model = one_layer()
    decor = decor_sgd(model, eta=0.01, every=3)
    model.load_state_dict(saved[0])
    decor.load_state_dict(saved[1])
    for step in range(4, 8):
        feed(model, decor, ill_conditioned(64, seed=step))
    assert torch.equal(R_of(model), R_of(straight))


# Schedules.


@pytest.mark.parametrize("library", ["torch", "timm"])
def test_eta_follows_the_schedule_of_the_main_optimizer(library):
    model = one_layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.4)
    decor = decor_sgd(model, eta=0.01, sample=1.0, follow=True, optimizer=optimizer)
    if library == "torch":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        advance = scheduler.step
    else:
        scheduler = CosineLRScheduler(optimizer, 10, warmup_t=3, warmup_lr_init=0.0)
        advance = lambda: scheduler.step(step)  # noqa: E731
    factors = []
    for step in range(1, 6):
        optimizer.zero_grad()
        model(ill_conditioned(64, condition=10, seed=step)).square().mean().backward()
        optimizer.step()
        decor.step()
        factors.append(optimizer.param_groups[0]["lr"] / 0.4)
        assert float(next(iter(decor.engine.rates().values()))) == pytest.approx(0.01 * factors[-1])
        advance()
    assert len(set(factors)) > 3


def test_following_an_optimizer_without_a_schedule_is_an_error():
    model = one_layer()
    decor = decor_sgd(model, follow=True, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="initial_lr"):
        feed(model, decor, ill_conditioned(64))


# Samples that are not finite.


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options",
    [{}, {"limit": None}, {"scale_free": True}, {"rank": 4}],
    ids=["limited", "plain", "scale-free", "low rank"],
)
@pytest.mark.parametrize("n", [100, 8])
def test_samples_that_are_not_finite_leave_R_alone_and_halve_its_rate(value, options, n):
    rank = {"rank": options["rank"]} if "rank" in options else {}
    rule = {k: v for k, v in options.items() if k != "rank"}
    model = one_layer(**rank)
    decor = decor_sgd(model, eta=0.01, sample=1.0, **rule)
    (layer,) = decorrelated(model).values()
    feed(model, decor, ill_conditioned(n))
    assert decor.engine.caution() == {}
    kept = layer.dense_R().clone()
    x = ill_conditioned(n, seed=1)
    x[3, 5] = value
    feed(model, decor, x)
    assert torch.equal(layer.dense_R(), kept)
    assert decor.engine.caution() == dict.fromkeys(decor.engine.names, 0.5)
    feed(model, decor, ill_conditioned(n, seed=2))
    assert not torch.equal(layer.dense_R(), kept)
    assert layer.dense_R().isfinite().all()
    assert float(decor.engine.rates()[decor.engine.names[0]]) <= 0.005 * (1 + 1e-12)


def test_an_R_made_in_the_forward_is_not_taken_over_if_it_is_not_finite():
    torch.manual_seed(0)
    model = mlp(D, 64, dtype=torch.float64, form="apply")
    decor = decor_sgd(model, eta=0.01, sample=1.0, limit=None)
    feed(model, decor, ill_conditioned(32))
    kept = R_of(model).clone()
    bad = ill_conditioned(32)
    bad[0] = torch.inf
    feed(model, decor, bad)
    assert torch.equal(R_of(model), kept)
    assert list(decor.engine.caution().values()) == [0.5]
    x = ill_conditioned(32, seed=1)
    feed(model, decor, x)
    expected = reference.update(kept[None], reference.transform(x, kept)[None], 0.005)[0]
    torch.testing.assert_close(R_of(model), expected, rtol=1e-12, atol=1e-14)


def test_one_layer_alone_is_careful():
    model = nn.ModuleDict({"a": mlp(D, 4, form="fold"), "b": mlp(D, 4, form="fold")})
    decor = decor_sgd(model, eta=0.01, sample=1.0)
    good, bad = ill_conditioned(64).float(), ill_conditioned(64).float()
    bad[0, 0] = torch.nan
    (model["a"](good).sum() + model["b"](bad).nan_to_num().sum()).backward()
    decor.step()
    assert list(decor.engine.caution().values()) == [0.5]
    assert next(iter(decor.engine.caution())).startswith("b.")
    R = [layer.R for layer in decorrelated(model).values()]
    assert not torch.equal(R[0], torch.eye(D))
    assert torch.equal(R[1], torch.eye(D))


def test_caution_is_kept_in_checkpoints_and_new_storage():
    model = one_layer(dtype=torch.float32)
    decor = decor_sgd(model, eta=0.01, sample=1.0)
    bad = ill_conditioned(64, dtype=torch.float32)
    bad[0] = torch.nan
    for _ in range(2):
        model(bad).nan_to_num().sum().backward()
        decor.step()
    model.double()
    feed(model, decor, ill_conditioned(64))
    assert list(decor.engine.caution().values()) == [0.25]
    other = one_layer()
    again = decor_sgd(other, eta=0.01)
    again.load_state_dict(decor.state_dict())
    assert list(again.engine.caution().values()) == [0.25]
