"""DecorSGD on layers with low-rank R: steps, losses, storage, copies, compiled training."""

import copy
import pickle

import pytest
import torch
from layers import DOUBLE, FORMS, equal, exact
from operators import SYNCHRONISING, operators
from rules import decor_sgd
from vits import captured, decorrelated, mlp, shake

from dbpkern import DecorLinear, reference

pytestmark = [
    # The exception is torch 2.9's own, in Dynamo.
    pytest.mark.filterwarnings("error", "default:.* should not be instantiated"),
    pytest.mark.usefixtures("poisoned"),
]

KAPPAS = [0.0, 0.3, 1.0]


def spiked(d, spikes, strength):
    """A second moment: the identity and some directions of greater variance."""
    U = torch.linalg.qr(torch.randn(d, spikes, **DOUBLE)).Q
    return torch.eye(d, **DOUBLE) + strength * U @ U.mT


def factors_of(model):
    return {name: [f.clone() for f in layer.factors] for name, layer in decorrelated(model).items()}


def stepped(factors, rows, lr, kappa=0.0):
    """What a step makes of the factors, for full and low-rank R."""
    if len(factors) == 1:
        return [reference.published_step(factors[0], rows, lr, kappa)]
    Q, S = (f[None] for f in factors)
    found = reference.lowrank_apply(Q, S, *reference.lowrank_statistics(rows[None], Q), lr, kappa)
    return [f[0] for f in found]


def check_step(model, before, rows, lr, kappa=0.0, tolerance=1e-9):
    for name, layer in decorrelated(model).items():
        wanted = stepped(before[name], rows[name], lr, kappa) if name in rows else before[name]
        for actual, expected in zip(layer.factors, wanted, strict=True):
            exact(actual, expected, tolerance)
        assert name not in rows or not torch.equal(layer.factors[-1], before[name][-1])


def mixed(*widths, ranks, dtype=torch.float64):
    """Linear layers in a row with tanh in between, each of its own structure."""
    model = mlp(*widths, dtype=dtype)
    for i, rank in enumerate(ranks):
        model[2 * i] = DecorLinear.from_linear(model[2 * i].fused(), rank=rank)
    return model


@pytest.mark.parametrize("kappa", [0.0, 0.2])
@pytest.mark.parametrize("sizes", [(30,), (16, 14), (8, 3, 19), (1, 0, 29)])
def test_steps_of_mixed_models_with_accumulation(sizes, kappa):
    model = mixed(5, 5, 5, 5, 5, 7, ranks=(2, None, 2, 3, 2))
    decor = decor_sgd(model, eta=0.05, kappa=kappa, sample=1.0)
    assert decor.engine.names == ["0", "2", "4", "6", "8"]
    assert sorted(len(stack.sites) for stack in decor.engine.stacks()) == [1, 1, 3]
    assert len(decor.param_groups[0]["params"]) == 9
    for _ in range(3):
        for n in sizes:
            model(torch.randn(n, 5, **DOUBLE)).square().sum().backward()
        before, rows = factors_of(model), captured(decor)
        assert all(len(part) == sum(sizes) for part in rows.values())
        decor.step()
        check_step(model, before, rows, 0.05, kappa)


@pytest.mark.parametrize("n", [4, 40])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_loss_is_that_of_the_reference_before_and_after_the_step(kappa, n):
    model = shake(mixed(5, 9, 5, 9, ranks=(2, None, 3)))
    decor = decor_sgd(model, eta=0.05, kappa=kappa, sample=1.0)
    assert decor.engine.loss() == {}
    for rows_of in (n, n // 2):
        model(torch.randn(rows_of, 5, **DOUBLE)).square().mean().backward()
        rows = captured(decor)

        def expected(rows=rows):
            return {
                name: reference.loss((r @ decorrelated(model)[name].dense_R().mT)[None], kappa)[0]
                for name, r in rows.items()
            }

        exact(decor.engine.loss(), expected())
        decor.step()
        exact(decor.engine.loss(), expected())


def test_decorrelation_loss_falls():
    model = mlp(16, 4, rank=3, dtype=torch.float64)
    x = torch.randn(400, 16, **DOUBLE) @ torch.linalg.cholesky(spiked(16, 3, 20.0)).mT
    decor = decor_sgd(model, eta=0.01, sample=1.0)
    losses = []
    for _ in range(150):
        model(x).square().mean().backward()
        losses.append(decor.engine.loss()["0"].item())
        decor.step()
    assert losses[-1] < 0.02 * losses[0]


NEW_STORAGE = {
    "double": lambda model: model.double(),
    "assigned checkpoint": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "stock checkpoint": lambda m: m.load_state_dict(
        {k: v for k, v in m.state_dict().items() if k.endswith(("weight", "bias"))}
    ),
}


@pytest.mark.parametrize("when", ["between steps", "between backward and step"])
@pytest.mark.parametrize("change", NEW_STORAGE)
def test_factors_may_get_new_storage_at_any_time(change, when):
    model = shake(mlp(6, 6, 6, rank=2))
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    for i in range(3):
        if i == 1 and when == "between steps":
            NEW_STORAGE[change](model)
        model(torch.randn(20, 6, dtype=model[0].weight.dtype)).square().sum().backward()
        if i == 1 and when != "between steps":
            NEW_STORAGE[change](model)
        before, rows = factors_of(model), captured(decor)
        decor.step()
        rows = {name: r.to(model[0].Q.dtype) for name, r in rows.items()}
        check_step(model, before, rows, 0.05, tolerance=2e-4)
    (Q, S), (stack,) = model[2].factors, decor.engine.stacks()
    assert [p is f for p, f in zip(decor.param_groups[0]["params"][2:], (Q, S), strict=True)] == [True, True]
    assert Q.data_ptr() == stack.factors[0][1].data_ptr()
    assert S.data_ptr() == stack.factors[1][1].data_ptr()


def test_in_the_steady_state_nothing_moves():
    model = mlp(6, 6, 6, rank=2)
    decor = decor_sgd(model, eta=0.01, sample=0.5)
    places = [f.data_ptr() for f in decor.param_groups[0]["params"]]
    rooms = []
    for n in (20, 20, 7, 20):
        model(torch.randn(n, 6)).square().mean().backward()
        decor.step()
        rooms.append([site.slot.room.data_ptr() for site in decor.engine.sites])
    assert rooms[1:] == rooms[:-1]
    assert [f.data_ptr() for layer in decorrelated(model).values() for f in layer.factors] == places


@pytest.mark.parametrize("rows", [torch.float64, torch.bfloat16])
def test_rows_of_other_dtypes_than_Q(rows):
    """Rows sampled before `.float()`, or under autocast."""
    model = mlp(6, 6, rank=2, dtype=torch.float64 if rows == torch.float64 else torch.float32)
    decor, x = decor_sgd(model, eta=0.05, sample=1.0), torch.randn(30, 6)
    with torch.autocast("cpu", torch.bfloat16, enabled=rows == torch.bfloat16):
        y = model(x.double() if rows == torch.float64 else x)
    y.float().square().mean().backward()
    assert captured(decor)["0"].dtype == model[0].Q.dtype
    model.float()
    before = factors_of(model)
    decor.step()
    check_step(model, before, {"0": x.to(rows).float()}, 0.05, tolerance=1e-5)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_a_step_never_reads_a_value_and_its_work_does_not_grow_with_the_layers(rate):
    counts = []
    for layers in (2, 5):
        model = mlp(*[8] * (layers + 1), rank=3)
        decor = decor_sgd(model, eta=rate, kappa=0.1, sample=1.0)
        for _ in range(2):
            model(torch.randn(20, 8)).square().mean().backward()
            names = operators(decor.step)
        assert not SYNCHRONISING & set(names)
        # Of the layers of a stack, only the parts of the sample buffer and of the factors are looked at.
        work = [n for n in names if n.startswith("dbpkern::") or n == "aten::bmm"]
        counts.append(sorted(work))
    assert counts[0] == counts[1]
    assert counts[0].count("dbpkern::lowrank_statistics") == 1
    assert counts[0].count("dbpkern::lowrank_step_") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing_and_runs_in_a_cuda_graph(dtype):
    model = shake(mlp(64, 64, 64, 96, 32, rank=16)).cuda()
    decor = decor_sgd(model, eta=torch.tensor(0.01, device="cuda"), sample=1.0)
    x = torch.randn(600, 64, device="cuda")

    def backward():
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(x).square().mean()
        model.zero_grad()
        loss.backward()

    factors = [factor for layer in decorrelated(model).values() for factor in layer.factors]
    start = [factor.clone() for factor in factors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backward()
        decor.step()  # makes the handles of the libraries, and finds the samples their place
        for factor, before in zip(factors, start, strict=True):
            factor.copy_(before)
        backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decor.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    expected = [factor.clone() for factor in factors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward()
        decor.step()
    for factor, before in zip(factors, start, strict=True):
        factor.copy_(before)
    graph.replay()
    for factor, wanted, before in zip(factors, expected, start, strict=True):
        torch.testing.assert_close(factor, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_run_goes_on_like_the_original(duplicate):
    def steps(model, decor, start, stop):
        for i in range(start, stop):
            x = torch.randn(30, 5, generator=torch.Generator().manual_seed(i))
            model(x).square().mean().backward()
            decor.step()

    model = mlp(5, 5, 4, rank=2)
    decor = decor_sgd(model, eta=0.05, kappa=0.1, sample=0.3, seed=5)
    steps(model, decor, 0, 2)
    twin, other = duplicate((model, decor))
    state = copy.deepcopy((model.state_dict(), decor.state_dict()))
    for pair in ((model, decor), (twin, other)):
        steps(*pair, 2, 5)
    resumed = mlp(5, 5, 4, rank=2)
    third = decor_sgd(resumed, kappa=0.1, sample=0.3)
    resumed.load_state_dict(state[0])
    third.load_state_dict(state[1])
    steps(resumed, third, 2, 5)
    for name, layer in decorrelated(model).items():
        assert equal(decorrelated(twin)[name].factors, layer.factors)
        assert equal(decorrelated(resumed)[name].factors, layer.factors)


@pytest.mark.parametrize("form", FORMS)
def test_compiled_training_never_recompiles_and_equals_eager(form):
    batches = [torch.randn(12, 5) for _ in range(4)]
    models = [mlp(5, 4, 3, form=form, rank=2)]
    models.append(copy.deepcopy(models[0]))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for model, backend in zip(models, ("eager", "aot_eager"), strict=True):
            run = torch.compile(model, fullgraph=True, backend=backend) if backend != "eager" else model
            decor = decor_sgd(model, eta=0.05, sample=0.5)
            main = torch.optim.SGD(model.parameters(), lr=0.01)
            for x in batches:
                main.zero_grad()
                run(x).square().mean().backward()
                main.step()
                decor.step()
    for one, other in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(layer.S.abs().max() > 1e-3 for layer in decorrelated(models[1]).values())
