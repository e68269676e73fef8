"""DecorSGD: the published rule, what a step costs, and what an optimizer owes its users."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from layers import CPU, Rs, backward, exact, identical, linears
from operators import SYNCHRONISING, operators
from rules import convert, decor_sgd
from torch import nn
from vits import captured, decorrelated, images, make, mlp, shake

import dbpkern
from dbpkern import reference

# The exception is torch 2.11's profiler.
pytestmark = pytest.mark.filterwarnings("error", "default:Warning. Profiler clears events")


# The published rule.

WIDTHS = (7, 11, 5)


def published_forward(x, Ws, bs, Rs):
    """z = R x for every token, y = W z + b, tanh in between; also returns each layer's input."""
    inputs = []
    for i, (W, b, R) in enumerate(zip(Ws, bs, Rs, strict=True)):
        inputs.append(x)
        z = x @ R.T
        x = z @ W.T + b
        if i < len(Ws) - 1:
            x = torch.tanh(x)
    return x, inputs


@pytest.mark.parametrize("form", ["fold", "apply"])
@pytest.mark.parametrize("kappa", [0.0, 0.1])
@pytest.mark.parametrize("sample", [1.0, 0.3])
@pytest.mark.parametrize(
    "optimizer",
    [lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), lambda p: torch.optim.AdamW(p, 0.01)],
    ids=["SGD", "AdamW"],
)
def test_training_equals_the_published_rule(optimizer, sample, kappa, form):
    eta = 0.05
    model = mlp(*WIDTHS, form=form, dtype=torch.float64)
    layers = list(decorrelated(model).values())
    Ws = [layer.weight.detach().clone().requires_grad_() for layer in layers]
    bs = [layer.bias.detach().clone().requires_grad_() for layer in layers]
    theirs = [torch.eye(d, dtype=torch.float64) for d in WIDTHS[:-1]]
    main, other = (
        optimizer(model.parameters()),
        optimizer([p for pair in zip(Ws, bs, strict=True) for p in pair]),
    )
    decor = decor_sgd(model, eta=eta, kappa=kappa, sample=sample, limit=None)
    mixing = torch.randn(7, 7, dtype=torch.float64)
    for _ in range(20):
        x = torch.randn(4, 6, 7, dtype=torch.float64) @ mixing
        target = torch.randn(4, 6, 5, dtype=torch.float64)
        main.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        index = decor.engine.sampler.index(24, 0, CPU)
        main.step()
        decor.step()

        other.zero_grad()
        y, inputs = published_forward(x, Ws, bs, theirs)
        published = F.mse_loss(y, target)
        published.backward()
        other.step()
        rows = [i.detach().flatten(0, 1) for i in inputs]
        rows = rows if sample == 1.0 else [r[index] for r in rows]
        theirs = [reference.published_step(R, r, eta, kappa) for R, r in zip(theirs, rows, strict=True)]

        exact(loss, published, 1e-10)
        for layer, W, b, R in zip(layers, Ws, bs, theirs, strict=True):
            exact(layer.R, R, 1e-10)
            exact(layer.weight, W, 1e-10)
            exact(layer.bias, b, 1e-10)
    assert all((R - torch.eye(len(R))).abs().max() > 0.01 for R in theirs)


# The optimizer.


def test_a_second_DecorSGD_takes_over():
    model, x = linears(2, 5), torch.randn(9, 5)
    first = decor_sgd(model, limit=None)
    backward(model, x)
    first.step()
    second = decor_sgd(model, limit=None)
    backward(model, x)
    assert captured(first) == {}
    for method in (first.engine.stacks, first.engine.loss):
        with pytest.raises(RuntimeError, match=r"samples of 0 no longer come here: .* another optimizer"):
            method()
    before = Rs(model)
    second.step()
    assert not torch.equal(Rs(model)["0"], before["0"])


def test_a_DecorSGD_is_freed():
    model = linears(1, 5)
    decor = decor_sgd(model, limit=None)
    backward(model, torch.randn(9, 5))
    decor.step()
    gone = weakref.ref(decor)
    del decor
    gc.collect()
    assert gone() is None


def test_learning_rate_schedulers_take_effect():
    for make_scheduler, rates in (
        (lambda d: torch.optim.lr_scheduler.LambdaLR(d, lambda i: 1 / (i + 1)), [0.2, 0.1, 0.2 / 3]),
        (lambda d: torch.optim.lr_scheduler.CosineAnnealingLR(d, 2), [0.2, 0.1, 0.0]),
    ):
        model = linears(2, 5, torch.float64)
        decor = decor_sgd(model, eta=0.2, sample=1.0, limit=None)
        scheduler = make_scheduler(decor)
        for rate in rates:
            before, x = Rs(model)["0"], torch.randn(9, 5, dtype=torch.float64)
            backward(model, x)
            decor.step()
            scheduler.step()
            exact(Rs(model)["0"], reference.published_step(before, x, rate))


def test_rate_as_a_tensor_changes_in_place():
    lr = torch.tensor(0.2, dtype=torch.float64)
    model = linears(1, 5, torch.float64)
    decor = decor_sgd(model, eta=lr, sample=1.0, limit=None)
    for rate in (0.2, 0.05):
        lr.fill_(rate)
        before, x = Rs(model)["0"], torch.randn(9, 5, dtype=torch.float64)
        backward(model, x)
        decor.step()
        exact(Rs(model)["0"], reference.published_step(before, x, rate))


def test_a_rate_of_zero_changes_nothing():
    model = linears(2, 5)
    decor = decor_sgd(model, eta=0.0, limit=None)
    backward(model, torch.randn(9, 5))
    decor.step()
    for R in Rs(model).values():
        identical(R, torch.eye(5))


def test_mixed_widths_and_dtypes_each_follow_the_rule():
    model = nn.Sequential(mlp(5, 7, 5, 7), mlp(7, 5, dtype=torch.float64), mlp(5, 5, dtype=torch.float64))
    decor = decor_sgd(model, eta=0.1, sample=1.0, limit=None)
    assert decor.engine.names == ["0.0", "0.2", "0.4", "1.0", "2.0"]
    inputs = {}
    for name, layer in decorrelated(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
    for _ in range(2):
        before = Rs(model)
        y = model[0](torch.randn(9, 5))
        model[2](model[1](y.double())).sum().backward()
        decor.step()
        for name, R in Rs(model).items():
            expected = reference.published_step(before[name], inputs[name], 0.1)
            torch.testing.assert_close(R, expected)
            assert R.dtype == before[name].dtype
    assert sorted(len(stack.sites) for stack in decor.engine.stacks()) == [1, 1, 1, 2]


@pytest.mark.parametrize("interrupted", [1, 3])
def test_resuming_from_checkpoints_gives_the_same_run(interrupted):
    def run(model, main, decor, scheduler, start, stop):
        for i in range(start, stop):
            for j in range(2):
                x = torch.randn(50, 6, generator=torch.Generator().manual_seed(10 * i + j))
                backward(model, x)
            main.step()
            main.zero_grad()
            decor.step()
            scheduler.step()

    def build(seed, lr):
        torch.manual_seed(3)
        model = linears(3, 6)
        decor = decor_sgd(model, eta=lr, kappa=0.3, sample=0.1, seed=seed, limit=None)
        main = torch.optim.AdamW(model.parameters(), 0.01)
        return model, main, decor, torch.optim.lr_scheduler.CosineAnnealingLR(decor, 10)

    whole = build(7, 0.1)
    run(*whole, 0, 5)
    first = build(7, 0.1)
    run(*first, 0, interrupted)
    states = [copy.deepcopy(part.state_dict()) for part in first]
    second = build(0, 0.5)
    run(*second, 0, 1)
    backward(second[0], torch.randn(50, 6))  # rows and draws that must not reach the resumed run
    second[1].zero_grad()
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    run(*second, interrupted, 5)
    for name, R in Rs(whole[0]).items():
        identical(Rs(second[0])[name], R)
    other = build(8, 0.1)
    run(*other, 0, 5)
    assert not torch.equal(Rs(other[0])["0"], Rs(whole[0])["0"])


def test_checkpoints_go_through_a_file(tmp_path):
    model = linears(2, 5)
    decor = decor_sgd(model, eta=torch.tensor(0.1), kappa=0.5, seed=4, limit=None)
    backward(model, torch.randn(9, 5))
    decor.step()
    torch.save(decor.state_dict(), tmp_path / "decor.pt")
    other = decor_sgd(linears(2, 5), limit=None)
    other.load_state_dict(torch.load(tmp_path / "decor.pt", weights_only=True))
    assert other.param_groups[0]["lr"] == torch.tensor(0.1)
    assert other.state_dict()["sampling"] == {"seed": 4, "step": 1}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (lambda: torch.optim.SGD([torch.ones(1)], 0.1).state_dict(), "expected the state of a DecorSGD"),
        (lambda: decor_sgd(linears(3, 5), limit=None).state_dict(), "doesn't match the size"),
    ],
)
def test_foreign_checkpoints_are_refused(state, match):
    decor = decor_sgd(linears(2, 5), eta=0.25, limit=None)
    with pytest.raises(ValueError, match=match):
        decor.load_state_dict(state())
    assert decor.param_groups[0]["lr"] == 0.25
    assert decor.state_dict()["sampling"] == {"seed": 0, "step": 0}


def test_a_step_without_a_backward_changes_nothing():
    model = linears(2, 5)
    decor = decor_sgd(model, eta=0.1, limit=None)
    backward(model, torch.randn(9, 5))
    decor.step()
    before = Rs(model)
    decor.step()
    for name, R in Rs(model).items():
        identical(R, before[name])


def test_drop_samples_drops_the_rows():
    model = linears(2, 5, torch.float64)
    decor = decor_sgd(model, eta=0.1, sample=1.0, limit=None)
    for _ in range(2):
        before, x = Rs(model)["0"], torch.randn(9, 5, dtype=torch.float64)
        backward(model, torch.randn(9, 5, dtype=torch.float64) * 1e6)
        decor.drop_samples()
        assert captured(decor) == {}
        assert decor.engine.loss() == {}
        backward(model, x)
        decor.step()
        exact(Rs(model)["0"], reference.published_step(before, x, 0.1))


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_loss_is_that_of_the_reference_before_and_after_the_step(kappa):
    model = shake(mlp(5, 7, 5, 7, dtype=torch.float64))
    decor = decor_sgd(model, eta=0.1, kappa=kappa, sample=0.5, limit=None)
    assert decor.engine.loss() == {}

    def expected(rows):
        return {
            name: reference.loss(reference.transform(r, decorrelated(model)[name].R)[None], kappa)[0]
            for name, r in rows.items()
        }

    for n in (20, 12):
        backward(model, torch.randn(n, 5, dtype=torch.float64))
        rows = captured(decor)
        assert [len(r) for r in rows.values()] == [n // 2] * 3
        before = decor.engine.loss()
        assert list(before) == decor.engine.names == ["0", "2", "4"]
        exact(before, expected(rows))
        decor.step()
        after = decor.engine.loss()
        exact(after, expected(rows))
        assert all(after[name] < before[name] for name in before)
        assert all(value.shape == () for value in after.values())


def test_loss_after_a_step_counts_no_older_rows():
    model = linears(2, 5)
    decor = decor_sgd(model, sample=1.0, limit=None)
    backward(model, torch.randn(9, 5))
    decor.step()
    assert decor.engine.loss().keys() == {"0", "2"}
    model[0](torch.randn(9, 5)).sum().backward()
    assert decor.engine.loss().keys() == {"0"}
    decor.step()
    assert decor.engine.loss().keys() == {"0"}
    decor.step()  # before which no layer met an input: nothing changes
    assert decor.engine.loss().keys() == {"0"}


# What a step costs.


def test_the_measure_of_operators_sees_inside_operators():
    assert SYNCHRONISING & set(operators(lambda: torch.ones(1).item()))
    R = torch.eye(3)[None].clone()
    names = operators(lambda: dbpkern.ops.update_(R, torch.randn(1, 9, 3), 0.1))
    assert {"dbpkern::update_", "dbpkern::correlation", "aten::bmm", "aten::baddbmm_"} <= set(names)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize(
    ("form", "n", "update"),
    [("fold", 4, "dbpkern::update_"), ("fold", 40, "dbpkern::apply_"), ("apply", 4, "aten::addcmul_")],
)
def test_step_never_reads_a_value(form, n, update, rate):
    """Reading a value on the host waits for the device."""
    model = mlp(5, 5, 7, 5, 5, form=form)
    decor = decor_sgd(model, eta=rate, kappa=0.1, sample=1.0, limit=None)
    for _ in range(2):
        backward(model, torch.randn(n, 5))
        names = operators(decor.step)
        updates = {"dbpkern::update_", "dbpkern::apply_", "aten::addcmul_"} & set(names)
        assert updates == {update}
        assert not SYNCHRONISING & set(names)


@pytest.mark.parametrize("n", [4, 40])
def test_the_work_of_a_step_does_not_grow_with_the_number_of_layers(n):
    counts = []
    for layers in (2, 6):
        model = linears(layers, 12)
        decor = decor_sgd(model, eta=0.1, sample=1.0, limit=None)
        for _ in range(2):
            backward(model, torch.randn(n, 12))
            names = operators(decor.step)
        work = [
            name
            for name in names
            if not name.startswith(("aten::select", "aten::unbind", "aten::as_strided"))
        ]
        assert work.count("dbpkern::update_" if n < 12 else "dbpkern::apply_") == 1
        counts.append({name: work.count(name) for name in set(work)})
    assert counts[0] == counts[1]


# What decorrelation does.


def correlated(n, d, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype) @ (torch.eye(d, dtype=dtype) + 0.2 * torch.randn(d, d, dtype=dtype))


def test_decorrelation_loss_falls_and_the_determinant_stays():
    model = mlp(8, 4, dtype=torch.float64)
    eta, x = 0.05, correlated(400, 8)
    decor = decor_sgd(model, eta=eta, sample=1.0, limit=None)
    losses, logdet = [], 0.0
    for _ in range(200):
        backward(model, x)
        losses.append(decor.engine.loss()["0"].item())
        z = reference.transform(x, model[0].R)
        M, _, _ = reference.correlation(z[None])
        decor.step()
        sign, new = torch.linalg.slogdet(model[0].R)
        assert sign == 1
        # log det(I - eta M) = -eta tr M - eta^2 tr(M^2) / 2 - ..., and the trace of M is 0.
        predicted = -(eta**2) * M.square().sum().item() / 2
        assert abs(new.item() - logdet - predicted) <= 0.5 * abs(predicted) + 1e-14
        assert new.item() <= logdet + 1e-14
        logdet = new.item()
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 1e-3 * losses[0]
    assert abs(logdet) < 0.2


def test_with_kappa_the_variances_go_to_one():
    model = mlp(6, 4, dtype=torch.float64)
    x = 2 * correlated(400, 6)
    decor = decor_sgd(model, eta=0.1, kappa=0.5, sample=1.0, limit=None)
    for _ in range(800):
        backward(model, x)
        decor.step()
    z = x @ model[0].R.T
    exact(z.T @ z / 400, torch.eye(6, dtype=torch.float64), 1e-3)


@pytest.mark.parametrize("sample", [0.1, 1.0])
def test_decorrelation_of_a_vision_transformer(sample):
    model = convert(make("timm"), sites="all")
    decor = decor_sgd(model, eta=2e-3, sample=sample, limit=None)
    x = images(4)
    losses = []
    for _ in range(12):
        backward(model, x)
        losses.append(decor.engine.loss())
        decor.step()
    assert losses[0].keys() == decorrelated(model).keys()
    falls = [losses[-1][name] < losses[0][name] for name in losses[0]]
    assert all(falls) if sample == 1.0 else sum(falls) > len(falls) / 2


# Refusals.

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        *(({"eta": lr}, f"eta: expected a finite number >= 0, got {lr}") for lr in (-1e-4, NAN, INF, -INF)),
        ({"eta": torch.zeros(3)}, r"eta: expected a number or a 0-d tensor, got shape \[3\]"),
        ({"eta": torch.zeros(1)}, r"eta: expected a number or a 0-d tensor, got shape \[1\]"),
        *(({"kappa": k}, rf"kappa: expected a number in \[0, 1\], got {k}") for k in (-0.1, 1.01, NAN, INF)),
        *(({"sample": s}, r"sample: expected a fraction in \(0, 1\]") for s in (0.0, -0.1, 1.5, NAN, INF)),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, match):
    model = linears(2, 5)
    with pytest.raises(ValueError, match=match):
        decor_sgd(model, **arguments, limit=None)
    assert all(layer.slot_key is None for layer in decorrelated(model).values())


def test_models_without_layers_are_refused():
    with pytest.raises(ValueError, match=r"decorrelated layers; call decorrelate\(model\) first"):
        decor_sgd(nn.Linear(3, 3), limit=None)
    with pytest.raises(TypeError, match="expected a model, got generator"):
        decor_sgd(linears(1, 3).parameters(), limit=None)


def test_a_closure_is_refused():
    model = linears(1, 3)
    decor = decor_sgd(model, limit=None)
    backward(model, torch.randn(9, 3))
    with pytest.raises(ValueError, match="expected no closure"):
        decor.step(lambda: None)
    identical(model[0].R, torch.eye(3))


@pytest.mark.parametrize("eta", [NAN, -1.0])
def test_a_step_with_a_rate_out_of_range_is_refused(eta):
    """Schedulers and users write into param_groups."""
    model = linears(2, 3)
    decor = decor_sgd(model, limit=None)
    backward(model, torch.randn(9, 3))
    decor.param_groups[0]["lr"] = eta
    with pytest.raises(ValueError, match="eta: expected"):
        decor.step()
    for R in Rs(model).values():
        identical(R, torch.eye(3))
