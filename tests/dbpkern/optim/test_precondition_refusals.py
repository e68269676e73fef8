"""What DecorPreconditioner refuses: arguments, models, optimizers, and a second one."""

import copy
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from optimizers import loss_of
from preconditioned import batch, network, precondition, train
from rules import convert
from torch import nn
from vits import everything

from dbpkern import Decor, DecorPreconditioner

REFUSALS = {
    "optimizer": (lambda m: (m, "adam"), TypeError, "expected a torch.optim.Optimizer, got str"),
    "model": (lambda m: ("model", sgd(m)), TypeError, "model: expected a module, got str"),
    "decor": (lambda m: (m, sgd(m), 0.1), TypeError, "decor: expected a Decor, got float"),
    "other model": (lambda m: (m, sgd(network()), ALL), ValueError, "it lacks 2 of 2"),
    "rank": (lambda m: (m, sgd(m), replace(ALL, rank=99)), ValueError, "0: rank: expected an integer in"),
    "sites": (lambda m: (m, sgd(m), Decor()), ValueError, "site 'patch_embed' matches no layer"),
}
ALL = Decor(sites=None, filter=everything)


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_and_leave_no_hooks(case):
    make_arguments, error, match = REFUSALS[case]
    model = network()
    with pytest.raises(error, match=match):
        DecorPreconditioner(*make_arguments(model))
    assert all(not m._forward_hooks for m in model.modules())
    optimizer = sgd(model)
    assert train(model, optimizer, 2)


def test_weights_that_another_optimizer_steps_are_refused():
    model = network()
    first = torch.optim.SGD(model[0].parameters(), 0.1)
    with pytest.raises(ValueError, match=r"it lacks 1 of 2 \(2, ...\)"):
        precondition(model, first)
    decor = precondition(model, first, filter=lambda name, module: name == "0")
    with pytest.raises(ValueError, match="it lacks 1 of 2"):
        decor.replan(model, ALL)
    assert list(decor.layers) == ["0"]
    assert not model[2]._forward_hooks


def test_a_copy_would_have_no_hooks():
    model = network()
    decor = precondition(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(TypeError, match="make a new one"):
        copy.deepcopy(decor)


def test_tied_and_converted_models_are_refused():
    model = network()
    model[2].weight = nn.Parameter(torch.zeros(24, 12, dtype=torch.float64))
    model[0].weight = model[2].weight
    with pytest.raises(ValueError, match="tied"):
        precondition(model, torch.optim.SGD(model.parameters(), 0.1))
    model = convert(network(), sites=None, filter=everything)
    with pytest.raises(ValueError, match="decorrelated already"):
        precondition(model, torch.optim.SGD(model.parameters(), 0.1))


def test_an_optimizer_that_evaluates_its_closure_again_is_refused():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1)
    precondition(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, batch(0))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="evaluates its closure once, but LBFGS does so again"):
        optimizer.step(closure)


def test_a_second_one_is_refused_until_the_first_is_removed():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    first = precondition(model, optimizer)
    with pytest.raises(ValueError, match=r"0: another optimizer holds this layer's R; call its remove"):
        precondition(model, optimizer)
    train(model, optimizer, 1)
    first.remove()
    precondition(model, optimizer)


def test_an_optimizer_without_hooks_is_refused_and_the_model_stays_free():
    class Bare(torch.optim.Optimizer):
        def __init__(self, inner):
            self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
            self._optimizer_step_pre_hooks = OrderedDict()

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with pytest.raises(TypeError, match="Bare lacks some; take the optimizer inside it"):
        precondition(model, Bare(optimizer))
    precondition(model, optimizer)


def test_cross_attention_is_refused():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.ModuleDict({"attention": attention})
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    precondition(model, optimizer, filter=lambda name, module: name == "attention")
    x = torch.randn(2, 3, 8)
    attention(x, x, x)[0].sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="self-attention alone"):
        attention(x, torch.randn(2, 3, 8), x)
