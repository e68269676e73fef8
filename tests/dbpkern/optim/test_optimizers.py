"""DecorAdamW and DecorMuon: what they compute, how people train with them, what they refuse."""

import copy
from dataclasses import replace

import pytest
import torch
from optimizers import (
    BOTH,
    RULE,
    RULES,
    D,
    adamw,
    batch,
    factors,
    groups,
    identical,
    loss_of,
    moved,
    network,
    parameters,
    same_run,
    train,
)
from timm.optim import muon as timm_muon
from torch import nn
from vits import everything, images, make

from dbpkern import Decor, DecorAdamW, DecorMuon, DecorPreconditioner, reference

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:.*autograd.function.Function.* should not be instantiated",  # older torch compilers' own
)


# The mathematics.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("closure", [False, True])
def test_without_a_model_DecorAdamW_is_AdamW_bit_for_bit(dtype, closure):
    models = network(dtype), network(dtype)
    start = parameters(models[0])
    optimizers = DecorAdamW(groups(models[0]), 0.01), torch.optim.AdamW(groups(models[1]), 0.01)
    losses = []
    for model, optimizer in zip(models, optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        losses.append(train(model, optimizer, 20, closure=closure, scheduler=scheduler))
    assert losses[0] == losses[1]
    identical(models[0].parameters(), models[1].parameters())
    assert moved(models[0], start)
    torch.testing.assert_close(
        optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"], rtol=0, atol=0
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rule", RULES)
def test_DecorAdamW_is_AdamW_between_the_maps(rule, dtype, tolerance):
    models = network(dtype), network(dtype)
    start = parameters(models[0])
    # Hooks cannot tell an optimizer's decay from its step, and map it, too.
    whole = DecorAdamW(groups(models[0], 0.0), 0.01, model=models[0], decor=RULES[rule])
    plain = torch.optim.AdamW(groups(models[1], 0.0), 0.01)
    around = DecorPreconditioner(models[1], plain, RULES[rule])
    for model, optimizer in zip(models, (whole, plain), strict=True):
        train(model, optimizer, 20, scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7))
    assert moved(models[0], start)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for one, other in zip(factors(whole), around.engine.factors(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=10 * tolerance)
        assert one.shape[0] == 5 or (one - torch.eye(*one.shape)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["timm", "torchvision", "huggingface"])
def test_vision_transformers_step_as_between_the_maps(kind):
    """A convolution, attention with one weight for q, k and v, and projections that share R."""
    models = make(kind).double(), None
    models = models[0], copy.deepcopy(models[0])
    sites = ("patch_embed", "qkv", "fc1", "fc2")
    decor = Decor(sites=sites, eta=0.2)
    whole = DecorAdamW(models[0].parameters(), 0.01, weight_decay=0.0, model=models[0], decor=decor)
    plain = torch.optim.AdamW(models[1].parameters(), 0.01, weight_decay=0.0)
    around = DecorPreconditioner(models[1], plain, decor)
    for model, optimizer in zip(models, (whole, plain), strict=True):
        for step in range(4):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(images(4).double()).square().mean().backward()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    for one, other in zip(factors(whole), around.engine.factors(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def orthogonalized(update, steps=5):
    return reference.orthogonalize(update[None], steps)[0]


def muon_by_hand(model, layers, step, memory, lr, decay, momentum, nesterov, scale):
    """A step of Muon on the matrices, between the maps by each layer's R, written for reading."""
    for name, V in model.named_parameters():
        if V.dim() == 1:
            continue
        R = layers[name.removesuffix(".weight")].dense_R() if layers else torch.eye(V.shape[1]).double()
        g = reference.map_gradient(V.grad, R)
        m = memory[name] = momentum * memory.get(name, torch.zeros_like(g)) + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * m if nesterov else m
        o, d = V.shape
        factor = max(1, o / d) ** 0.5 if scale == "original" else 0.2 * max(o, d) ** 0.5
        change = -lr * factor * orthogonalized(update)
        V.copy_(reference.map_change(V + change, V, R) - lr * decay * V)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rule", [None, "full", "mixed"])
def test_DecorMuon_by_hand(rule, nesterov, scale):
    model, twin = network(), network()
    decor = None if rule is None else RULES[rule]
    options = {"momentum": 0.9, "nesterov": nesterov, "scale": scale}
    optimizer = DecorMuon(groups(model), 0.01, model=rule and model, decor=decor, **options)
    vectors = torch.optim.AdamW(
        [p for p in twin.parameters() if p.dim() == 1], 0.02, (0.8, 0.9), weight_decay=0.0
    )
    memory = {}
    for step in range(10):
        layers = optimizer.engine.layers if rule else None
        twin.zero_grad()
        loss_of(twin, batch(step)).backward()
        with torch.no_grad():
            muon_by_hand(twin, layers, step, memory, 0.01, 0.1, 0.9, nesterov, scale)
        vectors.step()
        train(model, optimizer, 1, step)  # then R moves
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    if rule:
        assert all(
            (layer.dense_R() - torch.eye(len(layer.dense_R()))).norm() > 0.01 for layer in layers.values()
        )


@BOTH
def test_weights_decay_whatever_R_is(make_optimizer):
    """Mapped by an R that turns directions round, the decay would make them grow."""
    model = network()
    optimizer = make_optimizer(model, RULES["full"])
    chosen = {name: layer.weight for name, layer in optimizer.engine.layers.items()}
    for layer in optimizer.engine.layers.values():
        with torch.no_grad():
            layer.factors[0].neg_()
    before = {name: weight.detach().clone() for name, weight in chosen.items()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert chosen
    for name, weight in chosen.items():
        torch.testing.assert_close(weight.detach(), before[name] * (1 - 0.01 * 0.1), rtol=1e-12, atol=0)


@pytest.fixture
def exact_timm(monkeypatch):
    """timm's Newton-Schulz iteration in fp64 instead of bf16."""
    theirs = timm_muon.zeropower_via_newtonschulz
    monkeypatch.setattr(
        timm_muon, "zeropower_via_newtonschulz", lambda *a, **k: theirs(*a, **k, dtype=torch.float64)
    )


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rule", [None, "low", "full"])
def test_DecorMuon_is_timms_Muon_between_the_maps(exact_timm, rule, nesterov, scale):
    models = network(), network()
    if nesterov:  # timm's has Nesterov's momentum for vectors, too
        for model in models:
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.dim() > 1)
    options = {"momentum": 0.9, "nesterov": nesterov, "betas": (0.8, 0.9), "eps": 1e-7}
    theirs = {"adjust_lr_fn": scale, "ns_coefficients": "original"}

    def split(model):
        made = groups(model, 0.0 if rule else 0.1)
        return [{k: v for k, v in group.items() if k != "betas"} for group in made]

    ours = DecorMuon(
        split(models[0]), 0.01, scale=scale, model=rule and models[0], decor=RULES.get(rule), **options
    )
    plain = timm_muon.Muon(split(models[1]), 0.01, **options, **theirs)
    around = None if rule is None else DecorPreconditioner(models[1], plain, RULES[rule])
    losses = [train(*pair, 10) for pair in ((models[0], ours), (models[1], plain))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    if rule:
        for one, other in zip(factors(ours), around.engine.factors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_what_Muon_steps():
    """Matrices, but no vectors, tokens and tables of positions; a group may say so itself."""
    shapes = {
        "matrix": (4, 3),
        "kernel": (4, 3, 2, 2),
        "vector": (4,),
        "token": (1, 1, 4),
        "table": (1, 5, 4),
    }
    tensors = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    head = nn.Parameter(torch.randn(4, 3))
    optimizer = DecorMuon([{"params": list(tensors.values())}, {"params": [head], "use_muon": False}])
    for tensor in (*tensors.values(), head):
        tensor.grad = torch.randn_like(tensor)
    optimizer.step()
    by_muon = {name for name, tensor in tensors.items() if "momentum_buffer" in optimizer.state[tensor]}
    assert by_muon == {"matrix", "kernel"}
    assert "exp_avg" in optimizer.state[head]


def test_the_limit_is_the_same_with_fewer_rows_than_features():
    """As many processes have it, which average M: no bound of the rows instead."""
    model = nn.Linear(24, 3).double()
    decor = replace(Decor.layers(), sites=None, filter=everything, eta=10.0, sample=1.0)
    optimizer = DecorAdamW(model.parameters(), model=model, decor=decor)
    x = torch.randn(8, 24, dtype=torch.float64)
    model(x).square().mean().backward()
    optimizer.step()
    M = x.T @ x / 8
    M -= M.diag().diag()
    bound = min(M.norm(), M.abs().sum(1).max())
    (R,) = optimizer.engine.factors()
    torch.testing.assert_close(R, torch.eye(24).double() - 0.5 / bound * M, rtol=0, atol=1e-12)


# How people train.


@BOTH
@pytest.mark.parametrize("rule", RULES)
def test_a_closure_is_as_good_as_none(make_optimizer, rule):
    runs = [(m, make_optimizer(m, RULES[rule])) for m in (network(), network())]
    assert train(*runs[0], 6) == train(*runs[1], 6, closure=True)
    same_run(*runs)


@BOTH
@pytest.mark.parametrize("rule", RULES)
def test_gradients_may_be_kept_between_steps(make_optimizer, rule):
    runs = [(m, make_optimizer(m, RULES[rule])) for m in (network(), network())]
    assert train(*runs[0], 6) == train(*runs[1], 6, set_to_none=False)
    same_run(*runs)


@BOTH
def test_accumulation_and_dropped_samples(make_optimizer):
    runs = [(m, make_optimizer(m, replace(RULE, sample=1.0, every=1))) for m in (network(), network())]
    for step in range(5):
        x = batch(step)
        for (model, optimizer), parts in zip(runs, ((x,), x.split((10, 18, 12))), strict=True):
            optimizer.zero_grad()
            for part in parts:
                (loss_of(model, part) * len(part) / len(x)).backward()
            if step == 2:  # as for a loss that is not finite
                optimizer.drop_samples()
                assert not any(site.slot.pending for site in optimizer.engine.sites)
            else:
                optimizer.step()
    for one, other in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
    for one, other in zip(factors(runs[0][1]), factors(runs[1][1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@BOTH
@pytest.mark.parametrize("rule", [None, "full", "low"])
def test_lr_as_a_tensor(make_optimizer, rule):
    runs = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        model = network()
        optimizer = type(make_optimizer(network()))(
            model.parameters(), lr, weight_decay=0.1, model=rule and model, decor=RULES.get(rule)
        )
        train(model, optimizer, 3)
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.002)
        else:
            optimizer.param_groups[0]["lr"] = 0.002
        train(model, optimizer, 3, 3)
        runs.append(model)
    for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@BOTH
def test_eta_follows_the_schedule(make_optimizer):
    model = network()
    optimizer = make_optimizer(model, replace(RULE, follow=True, every=1, limit=None))
    with pytest.raises(RuntimeError, match="initial_lr"):
        train(model, optimizer, 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(3):
        train(model, optimizer, 1, step)
        scheduler.step()
        rates = optimizer.engine.rates()
        assert list(rates) == ["0", "3"]
        assert float(rates["0"]) == pytest.approx(0.1 * 0.5**step)


def test_weights_of_16_bits_have_R_of_32():
    models = network(torch.bfloat16), network(torch.bfloat16)
    start = parameters(models[0])
    whole, plain = adamw(models[0]), torch.optim.AdamW(groups(models[1]), 0.01)
    around = DecorPreconditioner(models[1], plain, RULE)
    for model, optimizer in zip(models, (whole, plain), strict=True):
        train(model, optimizer, 6)
    assert moved(models[0], start)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    for one, other in zip(factors(whole), around.engine.factors(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)


@BOTH
def test_a_GradScaler_skips_steps(make_optimizer):
    model = network(torch.float32)
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    skipped = []
    for step in range(4):
        before = parameters(model), factors(optimizer), optimizer.engine.sampler.step
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(step, torch.float32))).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        skipped.append(all(map(torch.equal, before[0], parameters(model))))
        if step == 1:
            identical(factors(optimizer), before[1])
            assert optimizer.engine.sampler.step == before[2]
    assert skipped == [False, True, False, False]
    assert scaler.get_scale() == 2.0**9


@BOTH
def test_layers_may_join_later(make_optimizer):
    """A frozen weight that the optimizer did not have: R rests until it trains."""
    model = network()
    model[0].weight.requires_grad_(False)
    rest = [p for p in model.parameters() if p.requires_grad]
    optimizer = type(make_optimizer(network()))(rest, 0.01, model=model, decor=RULE)
    with pytest.warns(UserWarning, match="1 of 2 layers sampled no input"):
        train(model, optimizer, 2)
    first = optimizer.engine.layers["0"]
    assert torch.equal(first.dense_R(), torch.eye(D).double())
    model[0].weight.requires_grad_(True)
    before = model[0].weight.detach().clone()
    optimizer.add_param_group({"params": [model[0].weight], "lr": 0.005})
    train(model, optimizer, 4, 2)
    assert not torch.equal(model[0].weight, before)
    assert (first.dense_R() - torch.eye(D)).norm() > 0.01
    assert torch.equal(optimizer.state_dict()["state"][len(rest)]["decor_R"], first.dense_R())


@BOTH
@pytest.mark.parametrize("rule", ["full", "low"])
def test_replanned_layers(make_optimizer, rule):
    model = network()
    optimizer = make_optimizer(model, RULES[rule])
    train(model, optimizer, 3)
    R, y = optimizer.engine.layers["0"].dense_R().clone(), model(batch(9))
    optimizer.replan(model, replace(RULES[rule], filter=lambda name, module: name == "0"))
    assert list(optimizer.engine.layers) == ["0"]
    assert torch.equal(optimizer.engine.layers["0"].dense_R(), R)
    assert torch.equal(model(batch(9)), y)
    before = parameters(model)
    losses = train(model, optimizer, 4, 3)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert moved(model, before, 1e-4)
    assert not torch.equal(optimizer.engine.layers["0"].dense_R(), R)
    with pytest.raises(ValueError, match="leaves no layer"):
        optimizer.replan(model, replace(RULE, filter=lambda name, module: False))
    train(model, optimizer, 2, 7)


@BOTH
@pytest.mark.parametrize("rule", ["full", "low"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_eager_one(make_optimizer, rule, backend):
    runs = [(m, make_optimizer(m, RULES[rule])) for m in (network(), network())]
    torch._dynamo.reset()
    compiled = torch.compile(runs[1][1].step, backend=backend)
    for step in range(5):
        for (model, optimizer), run in zip(runs, (runs[0][1].step, compiled), strict=True):
            optimizer.zero_grad()
            loss_of(model, batch(step)).backward()
            run()
    for one, other in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    for one, other in zip(factors(runs[0][1]), factors(runs[1][1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_weight_without_gradient_keeps_its_value_and_state():
    model = network()
    optimizer = adamw(model)
    train(model, optimizer, 2)
    before, state = model[0].weight.detach().clone(), copy.deepcopy(optimizer.state[model[0].weight])
    optimizer.zero_grad()
    loss_of(model, batch(2)).backward()
    model[0].weight.grad = None
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    for name in ("step", "exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[model[0].weight][name], state[name])


class Projections(nn.Module):
    """q, k and v by layers of their own, of which q may read something else."""

    def __init__(self, narrow=False):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(D, 8) for name in "qkv"})
        self.narrow = narrow

    def forward(self, x):
        q = self.attn["q"](x[:1] if self.narrow else x)
        return q + self.attn["k"](x) * self.attn["v"](x)


@BOTH
def test_R_goes_on_where_the_layer_that_is_sampled_is_frozen(make_optimizer):
    model = Projections().double()
    optimizer = make_optimizer(model, replace(RULE, sites=("qkv",), filter=None, every=1))
    train(model, optimizer, 1)
    for name in ("q", "k"):
        model.attn[name].weight.requires_grad_(False)
        train(model, optimizer, 1)  # whose sample is lost
        before = factors(optimizer)
        train(model, optimizer, 1, start=1)
        assert not torch.equal(optimizer.engine.factors()[0], before[0])


@BOTH
def test_a_model_is_free_again_without_its_optimizer(make_optimizer):
    model = network()
    optimizer = make_optimizer(model)
    with pytest.raises(ValueError, match="0: another optimizer holds this layer's R; call its remove"):
        make_optimizer(model)
    train(model, optimizer, 2)
    del optimizer
    second = make_optimizer(model)
    assert all(len(layer._forward_hooks) == 1 for layer in (model[0], model[3]))
    train(model, second, 2)
    second.remove()
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(str(name).startswith("decor") for entry in second.state.values() for name in entry)
    plain = [p.clone() for p in model.parameters()]
    train(model, second, 1)  # as a plain optimizer
    assert not any(torch.equal(*pair) for pair in zip(plain, model.parameters(), strict=True))
    make_optimizer(model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_R_moves_where_a_like_model_was_compiled_before(backend):
    for kind in ("plain", "decorrelated"):
        model = network()
        optimizer = adamw(model) if kind == "decorrelated" else torch.optim.AdamW(model.parameters())
        train(torch.compile(model, backend=backend), optimizer, 2)
    assert all(rate > 0 for rate in optimizer.engine.rates().values())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_may_change_outputs_in_place(backend):
    def changing():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 24), nn.ReLU(inplace=True), nn.Linear(24, 8)).double()

    models = changing(), changing()
    optimizers = [adamw(model) for model in models]
    compiled = torch.compile(models[1], backend=backend, fullgraph=True)
    assert train(models[0], optimizers[0], 3) == pytest.approx(train(compiled, optimizers[1], 3), rel=1e-12)
    for one, other in zip(*map(factors, optimizers), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_loss_of_R_between_two_backwards_loses_no_rows():
    model = network()
    optimizer = adamw(model, replace(RULE, sample=1.0))
    train(model, optimizer, 2)
    losses = [loss_of(model, batch(seed)) for seed in (2, 3)]
    losses[0].backward()
    assert optimizer.engine.loss()
    losses[1].backward()
    assert [site.slot.count() for site in optimizer.engine.sites] == [80, 80]
    rows = [rows for stack in optimizer.engine.stacks() for _, rows in stack.runs()]
    expected = torch.cat([batch(2), batch(3)])
    assert any(r.shape[-1] == D and torch.equal(r[0], expected) for r in rows)


# Refusals.


@pytest.mark.parametrize(
    ("make_optimizer", "options", "match"),
    [
        (DecorAdamW, {"lr": -1.0}, "lr: expected a number >= 0, got -1.0"),
        (DecorAdamW, {"lr": float("nan")}, "lr: .* got nan"),
        (DecorAdamW, {"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\)"),
        (DecorAdamW, {"eps": -1e-8}, "eps: expected a number >= 0"),
        (DecorAdamW, {"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
        (DecorMuon, {"lr": -1.0}, "lr: expected a number >= 0, got -1.0"),
        (DecorMuon, {"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        (DecorMuon, {"scale": "rms"}, r"scale: expected one of \('original', 'match_rms_adamw'\), got 'rms'"),
        (DecorMuon, {"betas": (-0.1, 0.9)}, "betas"),
        (DecorMuon, {"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_numbers_out_of_range_are_refused(make_optimizer, options, match):
    model = network()
    with pytest.raises(ValueError, match=match):
        make_optimizer(model.parameters(), model=model, decor=RULE, **options)
    assert not any(module._forward_hooks for module in model.modules())


@BOTH
def test_weights_that_the_optimizer_lacks_are_refused(make_optimizer):
    model = network()
    with pytest.raises(ValueError, match=r"it lacks 1 of 2 \(3, \.\.\.\)"):
        type(make_optimizer(network()))(model[0].parameters(), model=model, decor=RULE)
    assert not any(module._forward_hooks for module in model.modules())


@BOTH
def test_sparse_gradients_are_refused_before_anything_changes(make_optimizer):
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    groups = [{"params": list(model[1].parameters())}, {"params": list(model[0].parameters())}]
    decor = Decor(sites=None, filter=lambda name, module: True, rank=None)
    optimizer = type(make_optimizer(network()))(groups, model=model, decor=decor)
    optimizer.engine.factors()[0].mul_(2.0)
    model(torch.tensor([1, 2])).square().sum().backward()
    held = [model[1].weight.detach(), model[1].weight.grad, model[1].bias.detach()]
    before = [t.clone() for t in held]
    with pytest.raises(RuntimeError, match="expected dense gradients"):
        optimizer.step()
    assert all(torch.equal(t, old) for t, old in zip(held, before, strict=True))


@BOTH
def test_layers_that_read_different_inputs_are_refused(make_optimizer):
    decor = replace(RULE, sites=("qkv",), filter=None)
    for narrow in (False, True):
        model = Projections(narrow).double()
        optimizer = make_optimizer(model, decor)
        assert len(optimizer.engine.sites) == 1
        if not narrow:
            train(model, optimizer, 3)
            continue
        with pytest.raises(ValueError, match=r"one R to q, k and v .* the same tensor, got different ones"):
            model(batch(0))


@pytest.mark.parametrize("lr", [torch.tensor([0.1]), torch.tensor(1)])
@BOTH
def test_learning_rates_that_are_no_number_are_refused(make_optimizer, lr):
    with pytest.raises(ValueError, match="lr: expected a number or a 0-d tensor of one, got torch"):
        type(make_optimizer(network()))(network().parameters(), lr)
