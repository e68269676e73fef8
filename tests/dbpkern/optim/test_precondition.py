"""DecorPreconditioner: the same training as decorrelated layers, with the model left as it is."""

import copy
import gc
import io
import weakref

import pytest
import timm
import torch
from optimizers import loss_of
from preconditioned import ETA, D, batch, network, precondition, train
from rules import convert, decor_sgd, preconditioner
from timm.optim.muon import Muon
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import MODELS, decorrelated, everything, images, make

from dbpkern import DecorPreconditioner, ops
from dbpkern.structure import structure_of

# The mathematics.

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0),
    "Muon": lambda p: Muon(p, 0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("sample", [1.0, 0.3])
def test_it_trains_like_decorrelated_layers_whose_function_R_does_not_change(optimizer, rank, sample):
    plain, layered = network(), network()
    make_optimizer = OPTIMIZERS[optimizer]
    here, there = make_optimizer(plain.parameters()), make_optimizer(layered.parameters())
    decor = precondition(plain, here, rank=rank, sample=sample)
    convert(layered, sites=None, filter=everything, rank=rank)
    reference = decor_sgd(layered, eta=ETA, sample=sample, scale_free=True)
    for step in range(12):
        x = batch(step)
        losses = []
        for model, optimizer in ((plain, here), (layered, there)):
            optimizer.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-8)
        layers = decorrelated(layered)
        before = {name: layer.dense_R().clone() for name, layer in layers.items()}
        reference.step()
        with torch.no_grad():
            for name, layer in layers.items():  # W <- W R_old R_new^-1
                fused = layer.weight @ before[name]
                layer.weight.copy_(torch.linalg.solve(layer.dense_R().T, fused.T).T)
    for name, layer in layers.items():
        ours = decor.layers[name]
        torch.testing.assert_close(
            ours.structure.matrix(*ours.factors), layer.dense_R(), rtol=1e-7, atol=1e-9
        )
        assert not torch.equal(layer.dense_R(), torch.eye(len(layer.dense_R()), dtype=torch.float64))


@pytest.mark.parametrize("rank", [None, 5])
def test_one_step_by_hand(rank):
    model = network()
    (first, second) = (model[0], model[2])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    decor = precondition(model, optimizer, rank=rank)
    train(model, optimizer, 3)
    R = [decor.layers[name].dense_R().clone() for name in ("0", "2")]
    loss_of(model, batch(7)).backward()
    expected = [
        layer.weight - 0.1 * layer.weight.grad @ R_.T @ R_
        for layer, R_ in zip((first, second), R, strict=True)
    ]
    bias = first.bias - 0.1 * first.bias.grad
    optimizer.step()
    torch.testing.assert_close(first.weight, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(second.weight, expected[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(first.bias, bias)


@pytest.mark.parametrize("rank", [None, 5])
def test_the_step_of_R_does_not_change_the_function(rank):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    decor = precondition(model, optimizer, eta=0.3, rank=rank)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, optimizer, 5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], rtol=1e-13, atol=1e-16)
    for layer in decor.layers.values():
        assert (layer.dense_R() - torch.eye(len(layer.dense_R()))).abs().max() > 0.05


def test_it_decorrelates():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    decor = precondition(model, optimizer)
    train(model, optimizer, 1)
    start = decor.engine.loss()["0"] / batch(0).square().mean() ** 2
    train(model, optimizer, 150, 1)
    R = decor.layers["0"].factors[0]
    z = batch(0) @ R.T
    G = z.T @ z / len(z)
    off = G - G.diagonal().diag()
    assert off.square().sum() / D**2 / z.square().mean() ** 2 < 0.2 * start


def test_weight_decay_acts_in_the_coordinates_of_z():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
    decor = precondition(model, optimizer, eta=0.3)
    train(model, optimizer, 3)
    layer = decor.layers["0"]
    R, V = layer.factors[0].clone(), model[0].weight.detach().clone()
    optimizer.zero_grad(set_to_none=False)
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    optimizer.step()
    torch.testing.assert_close(model[0].weight, V - 0.05 * V @ R, rtol=1e-10, atol=1e-12)


# What it leaves alone.


def test_the_model_stays_stock():
    model = make("timm")
    classes = {name: type(m) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    x = images()
    expected = model.eval()(x)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    decor = DecorPreconditioner(model, optimizer)
    assert torch.equal(model(x), expected)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert list(model.state_dict()) == keys
    model.train()
    model(x).square().mean().backward()
    optimizer.step()
    assert len(decor.layers) == 1 + 4 * len(model.blocks)
    other = timm.create_model("vit_tiny_patch16_224", num_classes=model.num_classes, depth=1)
    assert set(other.state_dict()) <= set(model.state_dict())


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_vit_trains(kind):
    model = make(kind)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    decor = precondition(model, optimizer, sites="sublayers", sample=1.0, every=1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    output = model(images())
    (output if isinstance(output, torch.Tensor) else output[0]).square().mean().backward()
    optimizer.step()
    for name, layer in decor.layers.items():
        assert not torch.equal(layer.factors[0], torch.eye(len(layer.factors[0]))), name
    assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters())
    shared = [layer for layer in decor.layers.values() if layer.shared is not None]
    for layer in shared:
        same = [other for other in shared if other.shared is layer.shared]
        assert all(torch.equal(other.factors[0], layer.factors[0]) for other in same)


def test_remove_takes_it_off():
    model, other = network(), network()
    here, there = (torch.optim.SGD(m.parameters(), 0.05) for m in (model, other))
    decor = precondition(model, here)
    decor.remove()
    assert train(model, here, 5) == train(other, there, 5)
    assert not model[0]._forward_hooks


def test_frozen_weights_and_eval_rest():
    model = network()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    decor = precondition(model, optimizer, unsampled="warn")
    with pytest.warns(UserWarning, match="1 of 2 layers sampled no input.*: 2. Eval mode"):
        train(model, optimizer, 2)
    for layer in decor.layers.values():
        assert torch.equal(layer.factors[0], torch.eye(len(layer.factors[0]), dtype=torch.float64))


def test_a_copy_of_the_model_sends_no_samples():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    decor = precondition(model, optimizer)
    twin = copy.deepcopy(model)
    loss_of(twin, batch(0)).backward()
    assert all(not site.slot.pending for site in decor.engine.sites)


def test_it_is_freed_with_its_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    gone = weakref.ref(precondition(model, optimizer))
    train(model, optimizer, 1)
    del model, optimizer
    gc.collect()
    assert gone() is None


# How people train.


def test_accumulation_and_skipped_steps():
    whole, parts = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (whole, parts)]
    decors = [precondition(m, o) for m, o in zip((whole, parts), optimizers, strict=True)]
    for step in range(4):
        x = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(whole, x).backward()
        for piece in x.split(16):
            (loss_of(parts, piece) / 4).backward()
        if step == 2:  # as for a loss that is not finite
            for decor in decors:
                decor.drop_samples()
            continue
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole[0].weight, parts[0].weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        decors[0].layers["0"].factors[0], decors[1].layers["0"].factors[0], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize("fused", [False, True])
def test_a_GradScaler_skips_steps(rank, fused):
    """A fused optimizer makes the step itself, and leaves all as it is."""
    model = network(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    decor = precondition(model, optimizer, rank=rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(4):
        before = [t.clone() for t in (*model.parameters(), *decor.engine.factors())]
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch(step, dtype=torch.float32))).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        after = (*model.parameters(), *decor.engine.factors())
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert all(same) if step == 1 else not any(same)
    assert scaler.get_scale() == 2.0**9
    assert decor.engine.caution() == {}


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_samples_once(reentrant):
    torch.manual_seed(0)
    stem = nn.Linear(D, D, dtype=torch.float64)
    models = [nn.Sequential(copy.deepcopy(stem), network()) for _ in range(2)]
    decors, optimizers = [], []
    for model in models:
        optimizers.append(torch.optim.SGD(model.parameters(), 0.05))
        decors.append(precondition(model, optimizers[-1], sample=0.3))
    for step in range(3):
        x = batch(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(models[0], x).backward()
        y = checkpoint(models[1][1], models[1][0](x), use_reentrant=reentrant)
        (y - x[:, :8]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, layer in decors[0].layers.items():
        torch.testing.assert_close(
            decors[1].layers[name].factors[0], layer.factors[0], rtol=1e-10, atol=1e-12
        )


def test_compiled_models_train_alike():
    eager, compiled = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (eager, compiled)]
    decors = [precondition(m, o, sample=0.3) for m, o in zip((eager, compiled), optimizers, strict=True)]
    fast = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    train(eager, optimizers[0], 4)
    train(fast, optimizers[1], 4)
    torch.testing.assert_close(compiled[0].weight, eager[0].weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        decors[1].layers["2"].factors[0], decors[0].layers["2"].factors[0], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("rank", [None, 5])
def test_autocast_and_half_weights(rank):
    model = network(torch.float32)
    model[2].bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    decor = precondition(model, optimizer, rank=rank)
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(step, dtype=torch.float32))
        loss.backward()
        R = [decor.layers[name].dense_R().double() for name in ("0", "2")]
        expected = [
            layer.weight.double() - 0.05 * layer.weight.grad.double() @ R_.T @ R_
            for layer, R_ in zip((model[0], model[2]), R, strict=True)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
        torch.testing.assert_close(model[0].weight.double(), expected[0], rtol=1e-5, atol=1e-6)
        # A bf16 weight holds 1 / 256 of itself.
        torch.testing.assert_close(model[2].weight.double(), expected[1], rtol=1e-2, atol=1e-4)
    assert model[2].weight.dtype == torch.bfloat16
    for layer in decor.layers.values():
        assert all(factor.dtype == torch.float32 for factor in layer.factors)
        assert not torch.allclose(layer.dense_R(), torch.eye(len(layer.dense_R())), atol=1e-3)


@pytest.mark.parametrize("rank", [None, 5])
def test_a_model_made_double_later_keeps_its_digits(rank):
    model = network(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    decor = precondition(model, optimizer, rank=rank)
    model.double()
    with torch.no_grad():
        model[0].weight.add_(1e-12)
    before = model[0].weight.clone()
    train(model, optimizer, 3)
    torch.testing.assert_close(model[0].weight, before, rtol=0, atol=1e-15)
    assert decor.layers["0"].factors[0].dtype == torch.float64


@pytest.mark.parametrize("rank", [None, 5])
def test_the_change_of_a_weight_keeps_its_digits_in_fp32(rank):
    """Rounding on the way back is far below the change, also where the change is small."""
    d, size, change = 256, 0.02, 1e-5
    structure = structure_of(rank)
    factors = structure.start(d, torch.float32, torch.device("cpu"))
    factors[-1].add_(0.1 * torch.randn_like(factors[-1]))
    V = size * torch.randn(64, d)
    moved = V + change * torch.randn(64, d)
    expected = V.double() + (moved.double() - V.double()) @ structure.matrix(*factors).double()
    ops.map_changes_([moved], ops.remember([V], [factors]), [factors])
    error = (moved - expected).norm() / (expected - V).norm()
    assert error < 2e-3


@pytest.mark.parametrize("rank", [None, 5])
def test_channels_last_weights(rank):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 4, stride=4, dtype=torch.float64)
    models = [nn.Sequential(copy.deepcopy(conv)) for _ in range(2)]
    models[1].to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        precondition(model, optimizer, rank=rank)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tensor", [False, True])
def test_eta_may_be_set_between_steps(tensor):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    decor = precondition(model, optimizer, eta=torch.tensor(ETA) if tensor else ETA)
    for step in range(3):
        train(model, optimizer, 1, step)
        assert float(decor.engine.rates()["0"]) == pytest.approx(ETA * 0.5**step)
        if tensor:
            decor.engine.eta.mul_(0.5)
        else:
            decor.engine.eta *= 0.5


def test_eta_follows_the_optimizers_schedule():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    decor = precondition(model, optimizer, follow=True)
    with pytest.raises(RuntimeError, match="initial_lr"):
        train(model, optimizer, 1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(3):
        train(model, optimizer, 1, step)
        assert float(decor.engine.rates()["0"]) == pytest.approx(ETA * 0.5**step)
        scheduler.step()


CLOSURES = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "Muon": lambda p: Muon(p, 0.01),
}


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("kind", CLOSURES)
def test_a_closure_evaluated_once_is_as_good_as_none(kind, keyword):
    plain, closed = network(), network()
    here, there = (CLOSURES[kind](m.parameters()) for m in (plain, closed))
    decors = [precondition(m, o, sample=0.3, every=2) for m, o in ((plain, here), (closed, there))]
    expected = train(plain, here, 6)
    for step in range(6):

        def closure(step=step):
            there.zero_grad()
            loss = loss_of(closed, batch(step))
            loss.backward()
            return loss

        loss = there.step(closure=closure) if keyword else there.step(closure)
        assert loss.item() == expected[step]
    assert torch.equal(closed[0].weight, plain[0].weight)
    assert torch.equal(*(decor.layers["0"].factors[0] for decor in decors))


def test_an_optimizer_whose_step_calls_another_maps_once():
    class Outer(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    models = network(), network()
    torch.optim.SGD(models[0].parameters(), 0.05)  # from now on both steps run hooks
    optimizers = torch.optim.SGD(models[0].parameters(), 0.05), Outer(models[1].parameters(), 0.05)
    decors = [precondition(m, o, every=2) for m, o in zip(models, optimizers, strict=True)]
    assert train(models[0], optimizers[0], 6) == train(models[1], optimizers[1], 6)
    assert torch.equal(*(decor.layers["0"].factors[0] for decor in decors))


def test_a_step_that_failed_can_be_tried_again():
    class Fails(torch.optim.SGD):
        fails = False

        @torch.no_grad()
        def step(self, closure=None):
            if self.fails:
                raise MemoryError
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=0.05)

    models = network(), network()
    optimizers = [Fails(m.parameters(), 0.05) for m in models]
    decors = [precondition(m, o) for m, o in zip(models, optimizers, strict=True)]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
        optimizer.zero_grad()
        loss_of(model, batch(2)).backward()
    optimizers[1].fails = True
    with pytest.raises(MemoryError):
        optimizers[1].step()
    optimizers[1].fails = False
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight)
    torch.testing.assert_close(*(decor.layers["0"].factors[0] for decor in decors))


@pytest.mark.parametrize("every", [1, 2])
def test_dropping_the_rows_in_every_step_does_not_stop_R(every):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    decor = precondition(model, optimizer, every=every)
    for step in range(6):
        decor.drop_samples()
        train(model, optimizer, 1, step)
    assert (decor.layers["0"].factors[0] - torch.eye(D)).abs().max() > 0.01


def test_by_default_R_is_full_for_qkv_and_low_rank_elsewhere_and_moves_in_every_second_step():
    model = make("timm")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    decor = DecorPreconditioner(model, optimizer)
    twelfths = {"patch_embed.proj": 16}  # of 192 features; 24 and 96 give 8
    for name, layer in decor.layers.items():
        if name.endswith("qkv"):
            assert [tuple(f.shape) for f in layer.factors] == [(24, 24)]
        else:
            assert layer.factors[0].shape == (layer.weight[0].numel(), twelfths.get(name, 8))
    moved = []
    for _ in range(4):
        before = decor.layers["blocks.0.attn.qkv"].factors[0].clone()
        model(images()).square().mean().backward()
        optimizer.step()
        moved.append(not torch.equal(decor.layers["blocks.0.attn.qkv"].factors[0], before))
    assert moved == [True, False, True, False]


def test_low_ranks_everywhere():
    model = make("timm")
    low = preconditioner(model, torch.optim.SGD(model.parameters(), 0.01), rank="low")
    assert {layer.factors[0].shape[1] for name, layer in low.layers.items() if "blocks" in name} == {8}
    low.remove()
    with pytest.raises(ValueError, match=r"rank: expected .* one of \('mixed', 'low'\), got 'high'"):
        preconditioner(model, torch.optim.SGD(model.parameters(), 0.01), rank="high")
    assert not any(module._forward_hooks for module in model.modules())


# Checkpoints.

STATEFUL = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "SGD without momentum": lambda p: torch.optim.SGD(p, 0.05),
    "Muon": lambda p: Muon(p, 0.01),
}


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("rank", [None, 5])
def test_a_resumed_run_goes_on_exactly(rank, kind):
    """R goes where the optimizer's own state goes."""

    def start():
        model = network()
        optimizer = STATEFUL[kind](model.parameters())
        return model, optimizer, precondition(model, optimizer, rank=rank, sample=0.3, every=2)

    straight = start()
    expected = train(*straight[:2], 9)
    first = start()
    train(*first[:2], 4)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first[:2]], file)
    file.seek(0)
    second = start()
    train(*second[:2], 1)
    loss_of(second[0], batch(77)).backward()  # rows that must not reach the resumed run
    for part, state in zip(second[:2], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert train(*second[:2], 5, 4) == expected[4:]
    for name, layer in straight[2].layers.items():
        assert all(map(torch.equal, layer.factors, second[2].layers[name].factors))


def test_R_of_another_model_is_refused_and_changes_nothing():
    model, other = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    decor = precondition(model, optimizer)
    foreign = torch.optim.AdamW(other.parameters(), 0.5)
    precondition(other, foreign, rank=3)
    train(model, optimizer, 2)
    train(other, foreign, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"R of 0: expected \{'R': \[12, 12\]\}, got \{'Q'"):
        optimizer.load_state_dict(foreign.state_dict())
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(decor.layers["0"].factors[0], before["state"][0]["decor_R"])


def test_a_plain_state_loads_with_a_warning_and_R_is_the_identity():
    model, other = network(), network()
    optimizer, plain = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, other))
    decor = precondition(model, optimizer)
    train(model, optimizer, 3)
    train(other, plain, 2)
    with pytest.warns(UserWarning, match="the state holds no R"):
        optimizer.load_state_dict(plain.state_dict())
    assert torch.equal(decor.layers["0"].factors[0], torch.eye(D, dtype=torch.float64))
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], plain.state[other[0].weight]["exp_avg"])
    assert decor.engine.sampler.step == 0


def test_the_model_may_move():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    decor = precondition(model, optimizer)
    train(model, optimizer, 1)
    model.float()
    optimizer.zero_grad()
    loss_of(model, batch(1, dtype=torch.float32)).backward()
    optimizer.step()
    assert decor.layers["0"].factors[0].isfinite().all()
