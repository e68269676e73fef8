"""The layers: their outputs and gradients by definition, casts, their state, and what they take over."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layers import CONVS, DOUBLE, FORMS, attention, conv, exact, linear, patches
from layers import identical as assert_identical
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from dbpkern import DecorConv2d, DecorLinear, DecorMultiheadAttention

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:Using padding='same' with even kernel lengths",
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated",  # torch 2.9's own
    "ignore:`torch.jit.script_method` is deprecated",  # torch 2.11's own
)


# Outputs.


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (2, 2, 2, 5), (0, 5), (2, 0, 5)])
def test_linear_by_definition(shape, bias, form):
    layer, x = linear(form, bias=bias), torch.randn(shape, **DOUBLE)
    expected = torch.einsum("...i,ji,oj->...o", x, layer.R, layer.weight)
    exact(layer(x), expected + layer.bias if bias else expected)


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("case", CONVS)
def test_conv_by_definition(case, form):
    layer, x = conv(case, form), torch.randn(3, 2, 11, 14, **DOUBLE)
    z = patches(layer, x) @ layer.R.mT
    y = F.linear(z, layer.weight.flatten(1), layer.bias)
    stock = nn.Conv2d(2, 3, **CONVS[case], **DOUBLE)(x)
    assert (layer.bias is None) == ("bias" in CONVS[case])
    exact(layer(x), y.view(3, -1, 3).mT.reshape(stock.shape))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["patches", "overlap", "circular"])
def test_conv_without_a_batch_dimension(case, form):
    layer, x = conv(case, form), torch.randn(2, 11, 14, **DOUBLE)
    exact(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("form", FORMS)
def test_conv_of_an_empty_batch(form):
    layer = conv("patches", form)
    assert layer(torch.randn(0, 2, 11, 14, **DOUBLE)).shape == (0, 3, 3, 4)


ATTENTIONS = {
    "plain": ({}, {}),
    "no bias": ({"bias": False}, {}),
    "sequence first": ({"batch_first": False}, {}),
    "extra keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}),
    "no weights": ({}, {"need_weights": False}),
    "weights per head": ({}, {"average_attn_weights": False}),
    "mask": ({}, {"attn_mask": torch.ones(4, 4).triu(1).bool()}),
    "float mask": ({}, {"attn_mask": torch.linspace(-1, 1, 16).view(4, 4).double()}),
    "causal": ({}, {"attn_mask": torch.ones(4, 4).triu(1).bool(), "is_causal": True, "need_weights": False}),
    "padding": ({}, {"key_padding_mask": torch.tensor([[False, True, False, False]] * 4)}),
}


def both(outputs, others, compare):
    for one, other in zip(outputs, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            compare(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_by_definition(case, form):
    init, arguments = ATTENTIONS[case]
    layer, x = attention(form, **init), torch.randn(4, 4, 6, **DOUBLE)
    stock = nn.MultiheadAttention(6, 2, **DOUBLE | {"batch_first": True} | init)
    stock.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "R"})
    z = x @ layer.R.mT
    both(layer(x, x, x, **arguments), stock(z, z, z, **arguments), exact)


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_starts_as_the_stock_layer(case):
    init, arguments = ATTENTIONS[case]
    stock, x = (
        nn.MultiheadAttention(6, 2, **DOUBLE | {"batch_first": True} | init),
        torch.randn(4, 4, 6, **DOUBLE),
    )
    expected = stock(x, x, x, **arguments)
    for form in FORMS:
        layer = DecorMultiheadAttention.from_attention(stock, form)
        both(layer(x, x, x, **arguments), expected, assert_identical)


@pytest.mark.parametrize("form", FORMS)
def test_attention_without_a_batch_dimension(form):
    layer, x = attention(form), torch.randn(4, 6, **DOUBLE)
    batch = x[None]
    exact(layer(x, x, x)[0], layer(batch, batch, batch)[0][0])


def test_attention_drops_out_in_training_alone():
    layer, x = attention(dropout=0.5), torch.randn(2, 4, 6, **DOUBLE)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


def test_cross_attention_is_refused():
    layer, x, y = attention(), torch.randn(2, 4, 6, **DOUBLE), torch.randn(2, 4, 6, **DOUBLE)
    for arguments in ((x, y, y), (x, x, y), (x, y, x), (x, x.clone(), x)):
        with pytest.raises(ValueError, match="self-attention alone"):
            layer(*arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", [linear, conv, attention])
def test_gradients(make_layer, form):
    layer = make_layer(form=form)
    x = torch.randn((2, 2, 3, 6) if make_layer is conv else (2, 3, layer.R.shape[0]), **DOUBLE)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *parameters):
        args = (x, x, x) if make_layer is attention else (x,)
        y = functional_call(layer, dict(zip(names, parameters, strict=True)), args)
        return y[0] if make_layer is attention else y

    inputs = [p.detach().clone().requires_grad_() for p in (x, *parameters)]
    assert torch.autograd.gradcheck(call, inputs)
    assert not layer.R.requires_grad


@pytest.mark.parametrize("form", FORMS)
def test_weight_gradient_is_the_one_through_z(form):
    """dW = dY^T Z = (dY^T X) R^T, and dX = dY W R."""
    layer, x, g = linear(form), torch.randn(7, 5, **DOUBLE).requires_grad_(), torch.randn(7, 3, **DOUBLE)
    layer(x).backward(g)
    exact(layer.weight.grad, g.mT @ (x @ layer.R.mT))
    exact(layer.bias.grad, g.sum(0))
    exact(x.grad, g @ layer.weight @ layer.R)
    assert layer.R.grad is None


@pytest.mark.parametrize(("rows", "folds"), [(1, False), (3, False), (4, True), (50, True)])
def test_auto_folds_when_there_are_more_rows_than_outputs(rows, folds):
    layer = linear("auto", d=5, o=3)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(rows, 5, **DOUBLE))
    used = counter.get_flop_counts()["Global"]
    assert (torch.ops.dbpkern.fold in used) == folds
    assert (torch.ops.dbpkern.transform in used) == (not folds)


# Precision, casts and autocast.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make_layer", [linear, conv, attention])
def test_R_keeps_its_values_under_casts_of_the_model(make_layer, dtype):
    layer = make_layer(dtype=torch.float32)
    before = layer.R.clone()
    for cast in (lambda: layer.to(dtype), layer.half, layer.bfloat16):
        cast()
        assert next(layer.parameters()).dtype != torch.float32
        assert_identical(layer.R, before)
    layer.float()
    assert_identical(layer.R, before)
    layer.double()
    assert_identical(layer.R, before.double())
    layer.half()
    assert_identical(layer.R, before.double())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make_layer", [linear, conv, attention])
def test_low_precision_layers(make_layer, dtype, form):
    layer = make_layer(form=form, dtype=torch.float32).to(dtype)
    x = torch.randn((2, 2, 3, 6) if make_layer is conv else (2, 3, layer.R.shape[0]), dtype=dtype)

    def call(layer, x):
        return layer(x, x, x)[0] if make_layer is attention else layer(x)

    y = call(layer, x.requires_grad_())
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert all(p.grad.dtype == dtype for p in layer.parameters())
    expected = call(copy.deepcopy(layer).double(), x.detach().double())
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make_layer", [linear, conv, attention])
def test_autocast_computes_in_its_dtype(make_layer, dtype, form):
    layer = make_layer(form=form, dtype=torch.float32)
    x = torch.randn((2, 2, 3, 6) if make_layer is conv else (2, 3, layer.R.shape[0])).requires_grad_()
    arguments = (x,) * (3 if make_layer is attention else 1)
    expected = layer(*arguments)
    with torch.autocast("cpu", dtype):
        y = layer(*arguments)
    if make_layer is attention:
        y, expected = y[0], expected[0]
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert x.grad.dtype == layer.R.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_autocast_leaves_float64_alone():
    layer, x = linear("fold"), torch.randn(7, 5, **DOUBLE)
    with torch.autocast("cpu", torch.bfloat16):
        assert_identical(layer(x), layer(x.clone()))
        assert layer(x).dtype == torch.float64


# Taking over a stock layer, and giving it back.

STOCK = {
    "linear": (lambda: nn.Linear(5, 3), DecorLinear.from_linear),
    "conv": (lambda: nn.Conv2d(2, 3, 2, 2), DecorConv2d.from_conv),
    "attention": (lambda: nn.MultiheadAttention(6, 2), DecorMultiheadAttention.from_attention),
}


@pytest.mark.parametrize("kind", STOCK)
def test_the_layer_keeps_what_the_stock_layer_had(kind):
    make_stock, convert = STOCK[kind]
    stock = make_stock().eval().requires_grad_(False)
    calls = []
    handle = stock.register_forward_pre_hook(lambda module, args: calls.append(type(module)))
    stock.custom = {"a": 1}
    layer = convert(stock)
    assert isinstance(layer, type(stock))
    assert not layer.training
    assert dict(layer.named_parameters()).keys() == dict(stock.named_parameters()).keys()
    for one, other in zip(layer.parameters(), stock.parameters(), strict=True):
        assert one is other
        assert not one.requires_grad
    assert layer.custom == {"a": 1}
    assert "R" not in dict(stock.named_buffers())
    x = torch.randn(3, 2, 4, 4) if kind == "conv" else torch.randn(3, 6 if kind == "attention" else 5)
    arguments = (x, x, x) if kind == "attention" else (x,)
    layer(*arguments)
    assert calls == [type(layer)]
    handle.remove()
    layer(*arguments)
    assert calls == [type(layer)]


@pytest.mark.parametrize("kind", STOCK)
def test_R_starts_as_the_identity_in_at_least_fp32(kind):
    make_stock, convert = STOCK[kind]
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        layer = convert(make_stock().to(dtype))
        d = layer._matrix().shape[1]
        assert_identical(layer.R, torch.eye(d, dtype=wanted))
        assert layer.R.dtype == wanted


class Child(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: DecorLinear.from_linear(nn.Conv2d(1, 1, 1)),
            TypeError,
            "expected exactly Linear, got Conv2d",
        ),
        (lambda: DecorLinear.from_linear(Child(2, 2)), TypeError, "expected exactly Linear, got Child"),
        (lambda: DecorLinear.from_linear(linear()), TypeError, "expected exactly Linear, got DecorLinear"),
        (lambda: DecorLinear.from_linear(nn.Linear(2, 2), "both"), ValueError, "form: .* got 'both'"),
        (lambda: DecorConv2d.from_conv(nn.Linear(2, 2)), TypeError, "expected exactly Conv2d, got Linear"),
        (lambda: DecorConv2d.from_conv(nn.Conv2d(4, 4, 1, groups=2)), ValueError, "groups=1, got groups=2"),
        (lambda: DecorConv2d.from_conv(nn.Conv2d(4, 4, 1), ""), ValueError, "form: .* got ''"),
        (
            lambda: DecorMultiheadAttention.from_attention(nn.MultiheadAttention(4, 2, vdim=3)),
            ValueError,
            "one in_proj_weight for q, k and v, got kdim=4, vdim=3",
        ),
        (
            lambda: DecorMultiheadAttention.from_attention(nn.Linear(2, 2)),
            TypeError,
            "expected exactly MultiheadAttention, got Linear",
        ),
        (
            lambda: DecorMultiheadAttention.from_attention(nn.MultiheadAttention(4, 2), None),
            ValueError,
            "form: .* got None",
        ),
    ],
)
def test_refusals_of_taking_over(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("make_layer", [linear, conv, attention])
def test_fused_is_the_stock_layer_with_the_product_of_the_weights(make_layer):
    layer = make_layer(form="fold")
    x = torch.randn((2, 2, 3, 6) if make_layer is conv else (2, 3, layer.R.shape[0]), **DOUBLE)
    arguments = (x, x, x) if make_layer is attention else (x,)
    expected, weight = layer(*arguments), layer.weight
    product = layer._matrix() @ layer.R
    stock = layer.fused()
    assert type(stock) is layer.stock
    assert getattr(stock, layer.weight_name) is weight
    exact(weight.flatten(1), product)
    assert "R" not in stock.state_dict()
    arguments_of_stock = (2, 2, 1) if make_layer is conv else (2, 2)
    assert vars(stock).keys() - {"_compiled_call_impl"} == vars(type(stock)(*arguments_of_stock)).keys()
    if make_layer is attention:
        assert_identical(stock(*arguments)[0], expected[0])
    else:
        assert_identical(stock(*arguments), expected)


def test_repr_shows_R_and_a_forced_form():
    assert repr(linear()) == "DecorLinear(in_features=5, out_features=3, bias=True, R=[5, 5])"
    assert "kernel_size=(3, 3), stride=(3, 3), R=[18, 18], form=apply" in repr(conv(form="apply"))
    assert "R=[6, 6], form=fold\n" in repr(attention(form="fold"))


@pytest.mark.parametrize("make_layer", [linear, conv, attention])
def test_checkpoints_of_a_layer(make_layer):
    layer, other = make_layer(), make_layer()
    state = copy.deepcopy(layer.state_dict())
    assert not torch.equal(layer.R, other.R)
    other.load_state_dict(state)
    assert_identical(other.R, layer.R)
    stock = {k: v for k, v in state.items() if k != "R"}
    address = other.R.data_ptr()
    other.load_state_dict(stock)
    assert_identical(other.R, torch.eye(len(layer.R), **DOUBLE))
    assert other.R.data_ptr() == address
    with pytest.raises(RuntimeError, match=f"Missing key.*{layer.weight_name}"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        other.load_state_dict({layer.weight_name: stock[layer.weight_name]})


def test_a_checkpoint_without_the_weight_leaves_R_alone():
    layer = linear()
    before = layer.R.clone()
    missing = layer.load_state_dict({"bias": layer.bias.detach()}, strict=False).missing_keys
    assert missing == ["weight", "R"]
    assert_identical(layer.R, before)


@pytest.mark.parametrize("kind", STOCK)
def test_a_stock_checkpoint_fills_a_layer_on_the_meta_device(kind):
    make_stock, convert = STOCK[kind]
    state = make_stock().state_dict()
    with torch.device("meta"):
        layer = convert(make_stock())
    assert layer.R.is_meta
    layer.load_state_dict(state, assign=True)
    assert_identical(layer.R, torch.eye(len(layer.R)))
    assert not any(p.is_meta for p in layer.parameters())
