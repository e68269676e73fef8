"""Low-rank R in layers: what they compute, their state, and conversion."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from layers import DOUBLE, FORMS, equal, exact, identical
from rules import convert, decor_sgd
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from vits import MODELS, decorrelated, everything, images, make, mlp, shake

import dbpkern
from dbpkern import DecorConv2d, DecorLinear, DecorMultiheadAttention, diagnostics, reference

pytestmark = [
    # The exception is torch 2.9's own, in Dynamo.
    pytest.mark.filterwarnings("error", "default:.* should not be instantiated"),
    pytest.mark.usefixtures("poisoned"),
]
HALVES = [torch.bfloat16, torch.float16]


# Layers.

RANK = 2


def linear(form="auto", d=5, o=3, rank=RANK, dtype=torch.float64):
    return shake(DecorLinear.from_linear(nn.Linear(d, o, dtype=dtype), form, rank), 0.4)


def conv(form="auto", rank=RANK, dtype=torch.float64):
    return shake(DecorConv2d.from_conv(nn.Conv2d(2, 3, 3, 2, 1, dtype=dtype), form, rank), 0.4)


def attention(form="auto", rank=RANK, dtype=torch.float64):
    stock = nn.MultiheadAttention(6, 2, batch_first=True, dtype=dtype)
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.5)
    return shake(DecorMultiheadAttention.from_attention(stock, form, rank), 0.4)


LAYERS = [linear, conv, attention]


def input_of(layer, dtype=torch.float64):
    return torch.randn((2, 2, 5, 6) if layer.stock is nn.Conv2d else (2, 3, layer._matrix().shape[1])).to(
        dtype
    )


def call(layer, x):
    return layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)


def full_twin(layer):
    """The layer with the same R, held as a matrix."""
    twin = layer.stock.__new__(layer.stock)
    twin.__dict__.update(copy.deepcopy(layer).fused().__dict__)
    twin = type(layer)._from_stock(twin, layer.form, None)
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
        twin.R.copy_(layer.dense_R())
    return twin


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("make_layer", LAYERS)
def test_layers_compute_what_full_ones_with_the_same_R_do(make_layer, form):
    layer = make_layer(form)
    Q, S = layer.factors
    exact(layer.dense_R(), torch.eye(len(Q)) + Q @ S @ Q.mT)
    twin = full_twin(layer)
    x = input_of(layer).requires_grad_()
    y, expected = call(layer, x), call(twin, x)
    exact(y, expected)
    g = torch.randn_like(y)
    grads, wanted = (
        torch.autograd.grad(out, (x, *m.parameters()), g) for out, m in ((y, layer), (expected, twin))
    )
    for actual, other in zip(grads, wanted, strict=True):
        exact(actual, other)
    assert not any(f.requires_grad for f in layer.factors)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_gradients_of_layers(make_layer, form):
    layer = make_layer(form)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        args = (x, x, x) if make_layer is attention else (x,)
        y = functional_call(layer, dict(zip(names, parameters, strict=True)), args)
        return y[0] if make_layer is attention else y

    inputs = [p.detach().clone().requires_grad_() for p in (input_of(layer), *parameters)]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_layers_start_as_the_stock_layer_bit_for_bit(make_layer, form, dtype):
    layer = make_layer(form, dtype=dtype)
    layer.reset_R()
    x = input_of(layer, dtype)
    same = torch.testing.assert_close if (make_layer, form) == (conv, "apply") else identical  # unfolds
    same(call(layer, x), call(copy.deepcopy(layer).fused(), x))
    stock = layer.stock.__new__(layer.stock)
    stock.__dict__.update(layer.fused().__dict__)
    again = type(layer)._from_stock(stock, form, RANK)
    assert all(one is other for one, other in zip(again.parameters(), stock.parameters(), strict=True))
    assert {f.dtype for f in again.factors} == {torch.float32}
    same(call(again, x), call(stock, x))


def test_Q_starts_orthonormal_and_the_same_everywhere():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = linear(d=9, rank=4, dtype=torch.float32)
    torch.manual_seed(6)
    other = linear(d=9, rank=4, dtype=torch.float32)
    identical(one.Q, other.Q)
    exact(one.Q.double().mT @ one.Q.double(), torch.eye(4, **DOUBLE), 1e-6)
    assert one.Q.is_contiguous()
    wide = linear(d=9, rank=4)
    identical(wide.Q.float(), one.Q)
    assert not torch.allclose(linear(d=9, rank=5).Q[:, :4], wide.Q)
    torch.manual_seed(5)
    DecorLinear.from_linear(nn.Linear(9, 1, device="meta"), rank=4)
    identical(torch.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_fused_is_bit_identical_to_the_folded_form(make_layer, form):
    layer = make_layer(form)
    x = input_of(layer)
    expected, R, matrix = call(layer, x), layer.dense_R(), layer._matrix().detach().clone()
    stock = layer.fused()
    assert type(stock) is layer.stock
    assert not {"Q", "S", "R", "structure"} & (stock.state_dict().keys() | vars(stock).keys())
    exact(stock.in_proj_weight if make_layer is attention else stock.weight.flatten(1), matrix @ R)
    if form == "fold":
        identical(call(stock, x), expected)
    else:
        exact(call(stock, x), expected)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_Q_and_S_keep_their_values_under_casts_of_the_model(make_layer, dtype):
    layer = make_layer(dtype=torch.float32)
    before = [f.clone() for f in layer.factors]
    for cast in (lambda: layer.to(dtype), layer.half, layer.bfloat16):
        cast()
        assert next(layer.parameters()).dtype != torch.float32
        assert equal(layer.factors, tuple(before))
    x = input_of(layer, next(layer.parameters()).dtype)
    torch.testing.assert_close(
        call(layer, x).double(), call(copy.deepcopy(layer).double(), x.double()), rtol=0.05, atol=0.05
    )
    layer.float()
    assert equal(layer.factors, tuple(before))
    layer.double()
    assert equal(layer.factors, tuple(f.double() for f in before))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make_layer", LAYERS)
def test_autocast_computes_in_its_dtype(make_layer, form):
    layer = make_layer(form, dtype=torch.float32)
    x = input_of(layer, torch.float32).requires_grad_()
    expected = call(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(layer, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_repr_shows_the_rank():
    text = "DecorLinear(in_features=5, out_features=3, bias=True, R=[5, 5], rank=2)"
    assert repr(linear()) == text
    assert "R=[18, 18], rank=2, form=apply)" in repr(conv("apply"))


@pytest.mark.parametrize("make_layer", LAYERS)
def test_checkpoints_of_a_layer(make_layer):
    layer, other = make_layer(), make_layer()
    start = layer.Q.clone()
    layer.Q.copy_(start.flip(0))
    state = copy.deepcopy(layer.state_dict())
    assert {"Q", "S"} <= state.keys()
    other.load_state_dict(state)
    assert equal(other.factors, layer.factors)
    stock = {k: v for k, v in state.items() if k not in ("Q", "S")}
    places = [f.data_ptr() for f in other.factors]
    other.load_state_dict(stock)
    identical(other.S, torch.zeros_like(layer.S))
    identical(other.Q, start)
    assert [f.data_ptr() for f in other.factors] == places
    with pytest.raises(RuntimeError, match=r'Missing key.*"S"'):
        other.load_state_dict({k: v for k, v in state.items() if k != "S"})


def test_checkpoints_of_another_structure_are_refused_and_change_no_R():
    low, full = linear(), linear(rank=None)
    before = [t.clone() for t in (*low.factors, *full.factors)]
    with pytest.raises(RuntimeError, match=r'Missing key.*"Q", "S".*\n.*Unexpected key.*"R"'):
        low.load_state_dict(full.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"R".*\n.*Unexpected key.*"Q", "S"'):
        full.load_state_dict(low.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for Q"):
        low.load_state_dict(linear(rank=3).state_dict())
    assert equal((*low.factors, *full.factors), tuple(before))


def test_a_stock_checkpoint_fills_a_layer_on_the_meta_device():
    stock = nn.Linear(5, 3)
    with torch.device("meta"):
        layer = DecorLinear.from_linear(nn.Linear(5, 3), rank=2)
    assert all(f.is_meta for f in layer.factors)
    layer.load_state_dict(stock.state_dict(), assign=True)
    x = torch.randn(7, 5)
    identical(layer(x), stock(x))
    start = DecorLinear.from_linear(stock, rank=2).Q
    identical(layer.Q, start)
    with torch.device("meta"):
        layer = DecorLinear.from_linear(nn.Linear(5, 3), rank=2)
    layer.to_empty(device="cpu").load_state_dict(stock.state_dict())
    identical(layer.Q, start)
    identical(layer(x), stock(x))


@pytest.mark.parametrize(
    ("rank", "error", "match"),
    [
        (0, ValueError, r"rank: expected an integer in \[1, 5\], the layer's width, got 0"),
        (6, ValueError, "rank: .* got 6"),
        (-1, ValueError, "rank: .* got -1"),
        (2.0, TypeError, "rank: expected an integer or None, got float"),
        (True, TypeError, "rank: .* got bool"),
        ("2", TypeError, "rank: .* got str"),
    ],
)
def test_ranks_that_are_none(rank, error, match):
    stock = nn.Linear(5, 3)
    with pytest.raises(error, match=match):
        DecorLinear.from_linear(stock, rank=rank)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(duplicate):
    model = shake(mlp(5, 4, 3, rank=2))
    twin, x = duplicate(model), torch.randn(6, 5)
    identical(twin(x), model(x))
    for one, other in zip(decorrelated(twin).values(), decorrelated(model).values(), strict=True):
        assert one.structure == other.structure
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(one.factors, other.factors, strict=True))


def test_diagnostics_see_the_R_that_the_factors_make():
    model, x = shake(mlp(5, 4, rank=2, dtype=torch.float64), 0.5), torch.randn(40, 5, **DOUBLE)
    with diagnostics.observe(model) as layers:
        model(x)
    R = model[0].dense_R()
    exact(layers["0"].after, R @ (x.mT @ x / 40) @ R.mT)
    assert math.isclose(layers["0"].loss_after, reference.loss((x @ R.mT)[None])[0].item(), rel_tol=1e-9)


# Conversion.


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MODELS)
def test_conversion_changes_no_output_and_fusing_gives_the_stock_model_back(kind, form):
    stock, x = make(kind), images()
    # The applied convolution becomes a product of patches: another order of sums.
    sites = ("patch_embed", "qkv", "fc1") if form == "fold" else ("qkv", "fc1")
    model = convert(copy.deepcopy(stock), sites=sites, form=form, rank=3)
    assert {layer.structure.rank for layer in decorrelated(model).values()} == {3}
    identical(model(x), stock(x))
    shake(model)
    expected = model(x)
    assert not torch.allclose(expected, stock(x), rtol=1e-2)
    dbpkern.fuse(model)
    if form == "fold":
        identical(model(x), expected)
    else:
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == list(stock.state_dict())


def structures(model):
    return {name: getattr(layer.structure, "rank", None) for name, layer in decorrelated(model).items()}


def test_ranks_by_site():
    model = convert(make("timm"), sites="all", rank={"fc2": 5, "qkv": 2})
    for name, rank in structures(model).items():
        assert rank == (5 if name.endswith("fc2") else 2 if name.endswith("qkv") else None)
    model = convert(
        make("timm"), sites=None, filter=lambda name, _: name.startswith("blocks"), rank={"fc1": 24}
    )
    assert {rank for name, rank in structures(model).items() if name.endswith("fc1")} == {24}
    assert {rank for name, rank in structures(model).items() if not name.endswith("fc1")} == {None}


def test_ranks_as_parts_of_the_width_are_multiples_of_eight():
    model = convert(make("timm"), sites="all", rank=0.125)
    for name, layer in decorrelated(model).items():
        d = layer.weight[0].numel()
        rank = structures(model)[name]
        assert rank % 8 == 0
        assert rank - 8 < d / 8 <= rank
    model = convert(make("timm"), sites="all", rank={"fc2": 0.99, "blocks.0.attn.qkv": 0.2, "qkv": 3})
    for name, rank in structures(model).items():
        if name.endswith("fc2"):
            assert rank is None  # the whole width
        elif name.endswith("qkv"):
            assert rank == (8 if name.startswith("blocks.0") else 3)
        else:
            assert rank is None


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rank": 25}, ValueError, r"blocks.0.attn.qkv: rank: expected an integer in \[1, 24\].* got 25"),
        ({"rank": 0}, ValueError, r"patch_embed.proj: rank: .*\[1, 192\].* got 0"),
        ({"rank": {"fc1": 25}}, ValueError, "blocks.0.mlp.fc1: rank: .* got 25"),
        (
            {"rank": {"fc2": 3}},
            ValueError,
            r"rank: expected some of the chosen sites \('patch_embed', 'qkv', 'fc1'\) as keys, got 'fc2'",
        ),
        ({"rank": {"blocks": 3}}, ValueError, "chosen sites .* got 'blocks'"),
        (
            {"rank": 3.0},
            ValueError,
            r"rank: expected an integer, or a part of the width in \(0, 1\), got 3.0",
        ),
        ({"rank": {"fc1": 0.0}}, ValueError, r"rank: .* in \(0, 1\), got 0.0"),
        ({"rank": math.nan}, ValueError, r"rank: .* in \(0, 1\), got nan"),
        ({"rank": {"fc1": "3"}}, TypeError, "rank: .* got str"),
    ],
)
def test_refusals_of_conversion_leave_the_model_alone(arguments, error, match):
    model = make("timm")
    modules = list(model.modules())
    with pytest.raises(error, match=match):
        convert(model, **arguments)
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))


def shares(model):
    """Whether the q, k, v projections of each block hold the same Q and S, and no two blocks do."""
    groups = [
        [decorrelated(model)[f"encoder.layer.{i}.attention.attention.{n}"] for n in ("query", "key", "value")]
        for i in (0, 1)
    ]
    same = [layer.Q is group[0].Q and layer.S is group[0].S for group in groups for layer in group]
    return all(same) and groups[0][0].S is not groups[1][0].S


@pytest.mark.parametrize("how", ["trained", "deepcopy", "pickle", "bfloat16"])
def test_projections_of_one_input_share_Q_and_S(how):
    model = convert(make("huggingface"), sites="all", rank=3)
    assert shares(model)
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    assert len(decor.engine.names) == 1 + 2 * 4
    model(images()).square().mean().backward()
    decor.step()
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "bfloat16":
        model.bfloat16()
    assert shares(model)


def test_layers_work_in_a_filtered_model_of_any_kind():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    convert(model, sites=None, filter=everything, rank=6)
    x = torch.randn(9, 6)
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    identical(y, F.linear(torch.tanh(F.linear(x, *model[0].parameters())), *model[2].parameters()))
    assert torch.ops.dbpkern.lowrank_fold in counter.get_flop_counts()["Global"]
    assert all(
        a is b for a, b in itertools.pairwise(layer.structure.names for layer in decorrelated(model).values())
    )
