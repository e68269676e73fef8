"""Layers in training: which rows they hand over, also under torch.compile and autocast, and their copies."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from layers import CONVS, DOUBLE, FORMS, attention, conv, exact, linear, patches
from layers import identical as assert_identical
from rules import decor_sgd
from torch import nn
from torch.utils.checkpoint import checkpoint
from vits import captured, decorrelated, make, mlp
from vits import images as vit_images

import dbpkern

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:Using padding='same' with even kernel lengths",
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated",  # torch 2.9's own
    "ignore:`torch.jit.script_method` is deprecated",  # torch 2.11's own
)


# Which rows are handed over.


def take(layer, x, index=None):
    """The rows that a layer hands over."""
    n = layer.count_rows(x) if index is None else len(index)
    out = torch.full((n, layer.factors[0].shape[0]), torch.nan, dtype=x.dtype)
    layer.take_rows(out, x, index)
    return out


@pytest.mark.parametrize("case", CONVS)
def test_sampled_patches_are_those_of_unfold(case):
    layer, x = conv(case), torch.randn(3, 2, 11, 14, **DOUBLE)
    expected = patches(layer, x)
    assert layer.count_rows(x) == len(expected)
    assert_identical(take(layer, x), expected)
    index = torch.randperm(len(expected))[:7]
    assert_identical(take(layer, x, index), expected[index])
    assert_identical(take(layer, x.to(memory_format=torch.channels_last), index), expected[index])
    one = patches(layer, x[:1])
    assert layer.count_rows(x[0]) == len(one)
    assert_identical(take(layer, x[0], index % len(one)), one[index % len(one)])


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
def test_sampled_rows_of_tokens(shape):
    layer, x = linear(), torch.randn(shape, **DOUBLE)
    n = math.prod(shape[:-1])
    assert layer.count_rows(x) == n
    assert_identical(take(layer, x), x.reshape(n, 5))
    if n:
        strided = x.mT.contiguous().mT if x.dim() > 1 else x
        assert_identical(take(layer, strided, torch.tensor([n - 1])), x.view(n, 5)[-1:])


def test_rows_are_copies():
    """What the model does to its activations after the backward must not reach the sample."""
    for layer, x in ((linear(), torch.randn(4, 5, **DOUBLE)), (conv(), torch.randn(2, 2, 6, 6, **DOUBLE))):
        rows = take(layer, x)
        before = rows.clone()
        x.zero_()
        assert_identical(rows, before)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", [linear, conv, attention])
def test_the_backward_samples_the_input(make_layer, form):
    layer = make_layer(form=form)
    model = nn.ModuleDict({"layer": layer})
    decor = decor_sgd(model, sample=1.0)
    x = torch.randn((2, 2, 6, 6) if make_layer is conv else (2, 3, layer.R.shape[0]), **DOUBLE)
    y = layer(x, x, x)[0] if make_layer is attention else layer(x)
    assert captured(decor) == {}
    y.sum().backward()
    assert_identical(captured(decor)["layer"], take(layer, x))


def test_without_a_DecorSGD_nothing_is_captured():
    model, x = mlp(5, 4, 3), torch.randn(6, 5)
    model(x).sum().backward()
    assert all(layer.slot_key is None for layer in decorrelated(model).values())
    decor = decor_sgd(model, sample=1.0)
    slots = [weakref.ref(site.slot) for site in decor.engine.sites]
    del decor
    gc.collect()
    assert [slot() for slot in slots] == [None, None]
    model(x).sum().backward()  # the layers still name slots that are gone


@pytest.mark.parametrize(
    "how", ["no_grad", "inference_mode", "eval", "frozen", "no backward", "input gradient alone"]
)
def test_nothing_is_captured_where_nothing_trains(how):
    model, x = mlp(5, 4, 3), torch.randn(6, 5).requires_grad_()
    decor = decor_sgd(model, sample=1.0)
    if how in ("no_grad", "inference_mode"):
        with getattr(torch, how)():
            model(x)
    elif how == "no backward":
        model(x)
    elif how == "input gradient alone":
        torch.autograd.grad(model(x).sum(), x)
    else:
        if how == "eval":
            model.eval()
        else:
            model.requires_grad_(False)
        model(x).sum().backward()
    assert captured(decor) == {}
    model.train().requires_grad_(True)
    model(x).sum().backward()
    assert captured(decor).keys() == {"0", "2"}


def test_only_the_frozen_layer_rests():
    model, x = mlp(5, 4, 3), torch.randn(6, 5)
    decor = decor_sgd(model, sample=1.0)
    model[0].requires_grad_(False)
    model(x).sum().backward()
    assert captured(decor).keys() == {"2"}


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, **kwargs) -> None:
        super().__init__()
        self.inner, self.kwargs = inner, kwargs

    def forward(self, x):
        return checkpoint(self.inner, x, **self.kwargs)


CHECKPOINTS = {"reentrant": {"use_reentrant": True}, "not reentrant": {"use_reentrant": False}}


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_activation_checkpointing_samples_once_per_backward(case, backend):
    model, x = mlp(5, 4, 3), torch.randn(6, 5).requires_grad_()
    decor = decor_sgd(model, sample=0.5)
    model(x).square().sum().backward()
    plain = captured(decor)
    assert [len(rows) for rows in plain.values()] == [3, 3]
    decor.drop_samples()
    decor.engine.sampler.seek(0, 0)
    wrapped = Checkpointed(model, **CHECKPOINTS[case])
    call = torch.compile(wrapped, backend=backend, fullgraph=True) if backend else wrapped
    call(x).square().sum().backward()
    for name, rows in captured(decor).items():
        torch.testing.assert_close(rows, plain[name])
    call(x).square().sum().backward()
    assert [len(rows) for rows in captured(decor).values()] == [6, 6]


def test_calling_a_layer_twice_counts_both_inputs():
    layer, one, other = linear(), torch.randn(4, 5, **DOUBLE), torch.randn(3, 5, **DOUBLE)
    decor = decor_sgd(layer, sample=1.0)
    (layer(one).sum() + layer(other).sum()).backward()
    rows = captured(decor)[""]
    exact(rows.sort(0).values, torch.cat([one, other]).sort(0).values)


# Under torch.compile.


def train(model, decor, call, batches, double=False):
    """Steps of two micro-batches, with both backwards after both forwards if `double`."""
    main = torch.optim.SGD(model.parameters(), lr=0.01)
    for one, other in batches:
        main.zero_grad()
        if double:
            losses = [call(x).square().mean() for x in (one, other)]
            for loss in losses:
                loss.backward()
        else:
            for x in (one, other):
                call(x).square().mean().backward()
        main.step()
        decor.step()


def compare_with_eager(model, batches, backend, tolerance=1e-5, **kwargs):
    twin = copy.deepcopy(model)
    arguments = {"eta": 0.05, "sample": 0.5, "kappa": 0.1}
    decor, other = decor_sgd(model, **arguments), decor_sgd(twin, **arguments)
    train(twin, other, twin, batches, **kwargs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, decor, compiled, batches, **kwargs)
    for name, layer in decorrelated(model).items():
        reference = decorrelated(twin)[name]
        torch.testing.assert_close(layer.R, reference.R, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(layer.weight, reference.weight, rtol=tolerance, atol=tolerance)
        assert not torch.equal(layer.R, torch.eye(len(layer.R)))


@pytest.mark.parametrize("double", [False, True], ids=["in turn", "two forwards, two backwards"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_training_never_recompiles_and_equals_eager(form, double):
    batches = [(torch.randn(6, 5), torch.randn(6, 5)) for _ in range(4)]
    compare_with_eager(mlp(5, 4, 3, form=form), batches, "aot_eager", double=double)


def test_compiled_with_inductor_equals_eager():
    batches = [(torch.randn(6, 5), torch.randn(6, 5)) for _ in range(3)]
    compare_with_eager(mlp(5, 4, 3), batches, "inductor")


@pytest.mark.parametrize("kind", ["timm", "torchvision"])
def test_compiled_vision_transformers_equal_eager(kind):
    model = dbpkern.decorrelate(make(kind))
    batches = [(vit_images(2), vit_images(2)) for _ in range(3)]
    compare_with_eager(model, batches, "aot_eager", tolerance=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_step_under_autocast(dtype, form, backend):
    model, x = mlp(8, 8, 8, form=form), torch.randn(16, 8)
    decor = decor_sgd(model, eta=0.1, sample=0.5)
    call = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    with torch.autocast("cpu", dtype):
        loss = call(x).square().mean()
    loss.backward()
    assert {rows.dtype for rows in captured(decor).values()} == {torch.float32}  # on a CPU those of R
    decor.step()
    for layer in decorrelated(model).values():
        assert layer.R.dtype == torch.float32
        assert layer.R.isfinite().all()
        assert not torch.equal(layer.R, torch.eye(8))


# Copies.


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_does_not_feed_the_originals_optimizer(duplicate):
    model, x = mlp(5, 4, 3), torch.randn(6, 5)
    decor = decor_sgd(model, sample=1.0)
    twin = duplicate(model)
    twin(x).sum().backward()
    assert captured(decor) == {}
    model(x).sum().backward()
    assert captured(decor).keys() == {"0", "2"}
    assert all(layer.slot_key is None for layer in decorrelated(twin).values())
