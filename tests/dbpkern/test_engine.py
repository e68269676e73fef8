"""What every engine of R keeps, whoever drives it: idle steps, rates, caution, losses, its place in a run."""

import copy
import pickle

import pytest
import torch
from torch import nn
from vits import captured, everything

from dbpkern import Decor, DecorAdamW, DecorPreconditioner, DecorSGD, decorrelate, reference

pytestmark = pytest.mark.filterwarnings("error")

D = 6


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 4)).double()


def rule(**changes):
    return Decor(**{"sites": None, "filter": everything, "rank": None, "sample": 1.0, "every": 1} | changes)


def in_layers(**changes):
    model = decorrelate(network(), rule(**changes))
    decor = DecorSGD(model, rule(**changes))
    return model, decor.engine, decor.step


def around(**changes):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    return model, DecorPreconditioner(model, optimizer, rule(**changes)).engine, optimizer.step


def inside(**changes):
    model = network()
    optimizer = DecorAdamW(model.parameters(), 0.0, model=model, decor=rule(**changes))
    return model, optimizer.engine, optimizer.step


WAYS = pytest.mark.parametrize("make", [in_layers, around, inside])


def backward(model, x):
    model.zero_grad()
    model(x).square().mean().backward()


def rows(seed, n=20):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values(engine):
    return [factor.clone() for factor in engine.factors()]


@WAYS
@pytest.mark.parametrize("rank", [None, 2])
def test_all_ways_move_R_alike(make, rank):
    """As long as the weights rest, R depends on the inputs alone."""
    model, engine, step = make(rank=rank, eta=0.2)
    other, twin, follow = in_layers(rank=rank, eta=0.2)
    for module in (model, other):
        module[2].requires_grad_(False)
    for seed in range(5):
        for module, go in ((model, step), (other, follow)):
            module.zero_grad()
            module[0](rows(seed)).square().mean().backward()
            if seed:
                go()
            else:
                with pytest.warns(UserWarning, match="1 of 2 layers sampled no input"):
                    go()
        torch.testing.assert_close(values(engine), values(twin), rtol=1e-10, atol=1e-12)
    assert not torch.equal(engine.layers["0"].dense_R(), torch.eye(D).double())


@WAYS
def test_a_step_before_which_no_layer_met_an_input_changes_nothing(make):
    model, engine, step = make(every=2)
    backward(model, rows(0))
    step()
    before, losses = values(engine), engine.loss()
    for _ in range(3):
        model.zero_grad()
        step()
        assert engine.sampler.step == 1
        torch.testing.assert_close(values(engine), before, rtol=0, atol=0)
        torch.testing.assert_close(engine.loss(), losses, rtol=0, atol=0)
    backward(model, rows(1))
    step()
    assert engine.sampler.step == 2


@WAYS
def test_a_first_step_on_zero_gradients_is_a_loaders_and_one_without_samples_changes_nothing(make):
    model, engine, step = make()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step()
    assert engine.sampler.step == 0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="2 of 2 layers sampled no input before the first step"):
        step()


class Around(nn.Module):
    """Reads the weight of a layer without calling it, as some attentions do with qkv."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight, self.read.bias)


@pytest.mark.parametrize("outside", [True, False])
def test_a_layer_that_is_not_called_is_named_before_a_weight_changes(outside):
    def trained(model, **changes):
        decor = rule(**changes)
        if outside:
            optimizer = torch.optim.AdamW(model.parameters(), 0.1)
            DecorPreconditioner(model, optimizer, decor)
        else:
            optimizer = DecorAdamW(model.parameters(), 0.1, model=model, decor=decor)
        model(torch.randn(20, D).double()).square().mean().backward()
        optimizer.step()
        return optimizer

    model = Around().double()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"1 of 2 layers sampled no input .*gradient came .*: read\. Eval"):
        trained(model)
    assert all(map(torch.equal, model.parameters(), before))
    # Both ways out that the message names.
    with pytest.warns(UserWarning, match="1 of 2 layers"):
        trained(Around().double(), unsampled="warn")
    trained(Around().double(), filter=lambda name, module: name == "called")


def test_the_report_has_a_line_for_each_R():
    model = network()
    optimizer = DecorAdamW(
        model.parameters(), 0.1, model=model, decor=rule(rank={"2": 2}, limit=None, eta=0.01)
    )
    head, first, second = optimizer.report().splitlines()
    assert head.split() == ["layer", "site", "width", "R", "rows", "|R", "-", "I|", "eta"]
    assert first.split() == ["0", "-", str(D), "full", "0", "0", "0"]
    backward(model, rows(0))
    optimizer.step()
    _, first, second = optimizer.report().splitlines()
    *_, count, away, eta = first.split()
    R = optimizer.engine.layers["0"].dense_R()
    assert (count, eta) == ("20", "0.01")
    assert float(away) == pytest.approx(float((R - torch.eye(D)).norm()) / D**0.5, rel=0.01)
    assert second.split()[:5] == ["2", "-", str(D), "rank", "2"]
    optimizer.remove()
    with pytest.raises(
        ValueError, match=r"DecorAdamW.report: expected an optimizer that was made with a model"
    ):
        optimizer.report()


@WAYS
@pytest.mark.parametrize("rank", [None, 2])
def test_rates_caution_and_losses_are_those_of_each_layer(make, rank):
    model, engine, step = make(rank=rank, eta=0.01, scale_free=False, limit=None)
    assert engine.names == ["0", "2"]
    assert engine.loss() == engine.caution() == {}
    backward(model, rows(0))
    found = {site.name: site.slot.gather() for site in engine.sites}
    for _ in range(2):  # before the step, and after it of the same rows
        for name, loss in engine.loss().items():
            z = reference.transform(found[name], engine.layers[name].dense_R())
            torch.testing.assert_close(loss, reference.loss(z[None])[0])
        step()
    assert {name: float(rate) for name, rate in engine.rates().items()} == {"0": 0.01, "2": 0.01}
    bad = rows(1)
    bad[0, 0] = torch.inf
    model.zero_grad()
    model[2](model[1](model[0](bad)).nan_to_num()).nan_to_num().mean().backward()
    step()
    assert engine.caution() == {"0": 0.5}
    assert float(engine.rates()["0"]) == 0.0


@WAYS
def test_a_number_or_a_tensor_is_eta_and_may_be_set(make):
    model, engine, step = make(eta=torch.tensor(0.5), limit=None)
    for eta in (torch.tensor(0.25), 0.125, 0.0):
        if make is in_layers:
            step.__self__.param_groups[0]["lr"] = eta
        else:
            engine.eta = eta
        before = values(engine)
        backward(model, rows(int(8 * eta)))
        step()
        assert float(engine.rates()["2"]) == float(eta)
        assert torch.equal(values(engine)[0], before[0]) == (eta == 0)
    if make is not in_layers:
        engine.eta = -1.0
        backward(model, rows(9))
        with pytest.raises(ValueError, match="eta: expected a finite number >= 0"):
            step()


def test_equal_layers_lie_in_one_tensor_and_keep_their_place():
    model = nn.Sequential(*(nn.Linear(D, D) for _ in range(3)), nn.Linear(D, 4), nn.Linear(4, 4))
    optimizer = DecorAdamW(model.parameters(), model=model, decor=rule(rank={"1": 2}))
    places = [factor.data_ptr() for factor in optimizer.engine.factors()]
    sizes = sorted((len(stack.sites), stack.factors[0].shape[-1]) for stack in optimizer.engine.stacks())
    assert sizes == [(1, 2), (1, 4), (3, D)]
    for seed in range(3):
        optimizer.zero_grad()
        model(rows(seed).float()).square().mean().backward()
        optimizer.step()
    assert places == [factor.data_ptr() for factor in optimizer.engine.factors()]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_goes_on_and_sends_its_samples_to_itself(duplicate):
    model = decorrelate(network(), rule())
    decor = DecorSGD(model, rule(every=2, eta=0.2, filter=everything))
    for seed in range(2):
        backward(model, rows(seed))
        decor.step()
    twin, other = duplicate((model, decor))
    backward(twin, rows(2))  # the copy has not been stepped yet
    assert captured(decor) == {}
    assert captured(other).keys() == {"0", "2"}
    backward(model, rows(2))
    for one in (decor, other):
        one.step()
    torch.testing.assert_close(values(decor.engine), values(other.engine), rtol=0, atol=0)
    assert other.engine.sampler.step == 3
