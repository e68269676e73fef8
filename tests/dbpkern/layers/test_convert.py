"""Conversion of whole models and back, for the libraries that people's vision transformers come from."""

import copy
import pickle

import pytest
import torch
from layers import identical
from rules import convert, decor_sgd
from torch import nn
from torch.nn.utils import prune
from vits import (
    MODELS,
    PIXELS,
    SITES,
    WIDTH,
    captured,
    decorrelated,
    everything,
    images,
    make,
    shake,
    timm_vit,
)

import dbpkern
from dbpkern import DecorConv2d, DecorLinear, DecorMultiheadAttention, DecorSGD
from dbpkern.sites import PRESETS
from dbpkern.sites import SITES as SITE_NAMES

pytestmark = pytest.mark.filterwarnings("error")

STOCK = {nn.Linear: DecorLinear, nn.Conv2d: DecorConv2d, nn.MultiheadAttention: DecorMultiheadAttention}


def sites_of(kind, preset="all"):
    """The widest choice that the model's library allows."""
    return tuple(site for site in PRESETS[preset] if site in SITES[kind])


def names(kind, sites):
    return {name for site in sites for name in SITES[kind][site]}


def steps(model, decor, n, start=0):
    """n training steps with AdamW on fixed data; returns the losses."""
    main = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for i in range(start, start + n):
        x = torch.randn(3, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(i))
        main.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        main.step()
        decor.step()
        losses.append(loss.item())
    return losses


# What is converted.


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("site", SITE_NAMES)
def test_each_site_finds_its_layers(kind, site):
    model = make(kind)
    if site not in SITES[kind]:
        with pytest.raises(ValueError, match=r"nn.MultiheadAttention applies its output projection inside"):
            convert(model, sites=site)
        return
    stock = dict(model.named_modules())
    assert convert(model, sites=site) is model
    converted = decorrelated(model)
    assert list(converted) == SITES[kind][site]
    for name, layer in converted.items():
        assert type(layer) is STOCK[type(stock[name])]
        assert layer.site == site


@pytest.mark.parametrize("kind", MODELS)
def test_presets(kind):
    assert decorrelated(dbpkern.decorrelate(make(kind))).keys() == names(kind, ("patch_embed", "qkv", "fc1"))
    if kind != "torchvision":
        model = convert(make(kind), sites="all")
        assert decorrelated(model).keys() == names(kind, SITES[kind])


@pytest.mark.parametrize("sites", [["fc2", "qkv"], ("qkv", "fc2", "qkv"), {"fc2", "qkv"}])
def test_sites_come_in_any_collection_and_order(sites):
    model = convert(make("timm"), sites=sites)
    assert list(decorrelated(model)) == [
        "blocks.0.attn.qkv",
        "blocks.0.mlp.fc2",
        "blocks.1.attn.qkv",
        "blocks.1.mlp.fc2",
    ]


def test_filter_narrows_the_sites():
    seen = {}

    def choose(name, module):
        seen[name] = type(module)
        return "blocks.1" in name

    model = convert(make("timm"), filter=choose)
    assert decorrelated(model).keys() == {"blocks.1.attn.qkv", "blocks.1.mlp.fc1"}
    assert seen.keys() == names("timm", ("patch_embed", "qkv", "fc1"))
    assert seen["patch_embed.proj"] is nn.Conv2d


def test_filter_alone_chooses_among_all_layers_of_any_model():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "patches": nn.Conv2d(3, 4, 4, 4),
            "overlapping": nn.Conv2d(3, 4, 3, padding=1),
            "pointwise": nn.Conv2d(3, 4, 1),
            "mixer": nn.MultiheadAttention(4, 2),
            "norm": nn.LayerNorm(4),
        }
    )
    seen = []
    convert(model, sites=None, filter=lambda name, _: seen.append(name) or not name.endswith("out_proj"))
    assert decorrelated(model).keys() == {"linear", "patches", "mixer"}
    assert seen == ["linear", "patches", "mixer", "mixer.out_proj"]
    assert {layer.site for layer in decorrelated(model).values()} == {None}


def test_the_site_is_known_also_where_the_filter_alone_chooses():
    model = convert(make("timm"), sites=None, filter=everything)
    sites = {name: layer.site for name, layer in decorrelated(model).items()}
    assert sites.pop("head") is None
    assert sites == {name: site for site, found in SITES["timm"].items() for name in found}


def test_a_module_registered_twice_is_converted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.Linear(4, 4)])})
    convert(model, sites=None, filter=lambda name, _: name == "a")
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], DecorLinear)
    assert type(model["b"][1]) is nn.Linear
    dbpkern.fuse(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nn.Linear


def test_models_inside_wrappers_are_found():
    model = nn.ModuleDict({"module": make("timm")})
    convert(model, sites="qkv")
    assert list(decorrelated(model)) == ["module.blocks.0.attn.qkv", "module.blocks.1.attn.qkv"]


# Conversion changes nothing.


@pytest.mark.parametrize("form", ["auto", "fold", "apply"])
@pytest.mark.parametrize("kind", MODELS)
def test_conversion_leaves_outputs_bit_identical(kind, form):
    model, x = make(kind), images()
    expected = model(x)
    assert expected.abs().max() > 0.1
    convert(model, sites=sites_of(kind), form=form)
    assert {layer.form for layer in decorrelated(model).values()} == {form}
    if form == "apply":  # the convolution becomes a product of patches: another order of sums
        torch.testing.assert_close(model(x), expected)
        dbpkern.fuse(model)
        convert(model, sites=tuple(s for s in sites_of(kind) if s != "patch_embed"), form=form)
    identical(model(x), expected)


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_stay_the_same_objects(kind):
    model = make(kind)
    before = dict(model.named_parameters())
    main = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, sites=sites_of(kind))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())
    values = {name: parameter.detach().clone() for name, parameter in before.items()}
    model(images()).square().mean().backward()
    main.step()
    for name in names(kind, sites_of(kind)):
        weight = f"{name}.{decorrelated(model)[name].weight_name}"
        assert not torch.equal(after[weight], values[weight])


@pytest.mark.parametrize("kind", MODELS)
def test_training_moves_every_R_and_fusing_keeps_the_outputs(kind):
    stock, model, x = make(kind), make(kind), images()
    convert(model, sites=sites_of(kind))
    decor = decor_sgd(model, eta=0.05, sample=0.5)
    steps(model, decor, 1)
    for name, layer in decorrelated(model).items():
        assert not torch.equal(layer.R, torch.eye(len(layer.R))), name
        assert layer.R.isfinite().all()
    shake(model, 0.05)
    parameters = list(model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert dbpkern.fuse(model) is model
        fused = model(x)
    assert (fused - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert decorrelated(model) == {}
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert list(model.state_dict()) == list(stock.state_dict())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        identical(stock.eval()(x), fused)


@pytest.mark.parametrize("kind", ["timm", "huggingface"])
@pytest.mark.parametrize("training", [False, True])
def test_fusing_the_folded_form_is_bit_identical(kind, training):
    model, x = make(kind), images()
    shake(convert(model, sites="all", form="fold"))
    with torch.no_grad():
        expected = model.train(training)(x)
        identical(dbpkern.fuse(model)(x), expected)


def test_fusing_torchvisions_folded_form_is_bit_identical_in_training():
    """In eval mode the stock attention takes another path, whose sums come in another order."""
    model, x = make("torchvision"), images()
    shake(convert(model, sites=sites_of("torchvision"), form="fold"))
    expected = model(x)
    identical(dbpkern.fuse(model)(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected.detach())


def test_fusing_again_after_converting_again():
    model, x = make("timm"), images()
    stock = copy.deepcopy(model)
    for _ in range(2):
        shake(dbpkern.decorrelate(model), 0.05)
        expected = model(x)
        dbpkern.fuse(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(x), stock(x), rtol=0.01)


def test_fusing_stops_the_optimizer():
    model = dbpkern.decorrelate(make("timm"))
    decor = DecorSGD(model)
    steps(model, decor, 1)
    dbpkern.fuse(model)
    with pytest.raises(RuntimeError, match="fused"):
        decor.step()


# Checkpoints.


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_stock_checkpoints_load_strictly_and_reset_R(kind, assign):
    stock, x = make(kind), images()
    model = shake(convert(make(kind), sites=sites_of(kind), form="fold"))
    state = {k: v.clone() for k, v in stock.state_dict().items()}
    result = model.load_state_dict(state, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for layer in decorrelated(model).values():
        identical(layer.R, torch.eye(len(layer.R)))
    identical(model(x), stock(x))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_converted_checkpoints_round_trip(kind, assign):
    model, other, x = (make(kind) for _ in range(2)), None, images()
    model, other = (convert(m, sites=sites_of(kind)) for m in model)
    decor = decor_sgd(model, eta=0.05, sample=0.5)
    steps(model, decor, 1)
    state = copy.deepcopy(model.state_dict())
    assert {f"{name}.R" for name in decorrelated(model)} <= state.keys()
    other.load_state_dict(state, strict=True, assign=assign)
    identical(other(x), model(x))
    for name, layer in decorrelated(other).items():
        identical(layer.R, decorrelated(model)[name].R)
    # Its DecorSGD takes the loaded R over, whatever storage they are in.
    steps(other, decor_sgd(other, eta=0.05, sample=0.5), 1, start=1)
    steps(model, decor, 1, start=1)
    other.load_state_dict(state, strict=True, assign=assign)
    for name, layer in decorrelated(other).items():
        identical(layer.R, state[f"{name}.R"])


def test_loading_between_steps_keeps_the_optimizer_going():
    stock, model = make("huggingface"), convert(make("huggingface"), sites="all")
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    steps(model, decor, 2)
    model.load_state_dict(stock.state_dict(), assign=True)
    fresh = convert(copy.deepcopy(stock), sites="all")
    assert steps(model, decor, 3) == steps(fresh, decor_sgd(fresh, eta=0.05, sample=1.0), 3)
    for name, layer in decorrelated(fresh).items():
        identical(decorrelated(model)[name].R, layer.R)


# One R for projections of one input.


def shares_R(model):
    layers = decorrelated(model)
    groups = [
        [layers[n] for n in layers if n.startswith(f"encoder.layer.{i}.attention.attention")] for i in (0, 1)
    ]
    assert [len(group) for group in groups] == [3, 3]
    return [all(layer.R is group[0].R for layer in group) for group in groups] == [True, True]


def test_separate_projections_share_one_R():
    model = convert(make("huggingface"), sites="all")
    assert shares_R(model)
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    assert [name for name in decor.engine.names if "attention.attention" in name] == [
        f"encoder.layer.{i}.attention.attention.query" for i in (0, 1)
    ]
    steps(model, decor, 1)
    assert shares_R(model)
    one, other = (model.encoder.layer[i].attention.attention.query.R for i in (0, 1))
    assert not torch.equal(one, other)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "half": lambda m: m.half().float(),
    "bfloat16": lambda m: m.to(torch.bfloat16).float(),
    "float": lambda m: m.to("cpu", torch.float32),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_shared_R_stay_shared(how, trained):
    model = convert(make("huggingface"), sites="all")
    if trained:
        steps(model, decor_sgd(model, eta=0.05), 1)
    before = {name: layer.R.clone() for name, layer in decorrelated(model).items()}
    model = COPIES[how](model)
    for name, layer in decorrelated(model).items():
        identical(layer.R, before[name].to(layer.R.dtype))
    if how != "double":
        assert shares_R(model)
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    assert shares_R(model)
    assert len(decor.engine.names) == 1 + 2 * 4
    model(images().to(next(model.parameters()).dtype)).square().mean().backward()
    decor.step()
    assert shares_R(model)


def test_shared_R_go_through_a_checkpoint():
    model, other = (convert(make("huggingface"), sites="all") for _ in range(2))
    steps(model, decor_sgd(model, eta=0.05), 1)
    other.load_state_dict(model.state_dict())
    assert shares_R(other)
    for name, layer in decorrelated(other).items():
        identical(layer.R, decorrelated(model)[name].R)


def test_shared_R_get_one_sample_from_a_projection_that_trains():
    model = convert(make("huggingface"), sites="qkv")
    model.encoder.layer[0].attention.attention.query.requires_grad_(False)
    decor = decor_sgd(model, eta=0.05, sample=1.0)
    model(images()).square().mean().backward()
    rows = captured(decor)
    assert len(rows) == 2
    assert {r.shape for r in rows.values()} == {(3 * 16, WIDTH)}


def test_projections_of_other_inputs_keep_their_own_R():
    block = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(6, 4), "v": nn.Linear(6, 4)})
    model = nn.ModuleDict({"attn": block, "other": nn.ModuleDict({"attn": copy.deepcopy(block)})})
    convert(model, sites="qkv")
    assert block["k"].R is block["v"].R
    assert block["q"].R is not block["k"].R
    assert model["other"]["attn"]["k"].R is not block["k"].R


# Copies of a training run.


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copied_run_goes_on_like_the_original(duplicate, order):
    model = convert(make("huggingface"), sites="all")
    decor = decor_sgd(model, eta=0.05, kappa=0.1, sample=0.3, seed=5)
    steps(model, decor, 2)
    if order == "model first":
        twin, other = duplicate((model, decor))
    else:
        other, twin = duplicate((decor, model))
    assert twin is not model
    losses = steps(model, decor, 3, start=2)
    assert steps(twin, other, 3, start=2) == losses
    for name, layer in decorrelated(model).items():
        identical(decorrelated(twin)[name].R, layer.R)
    assert shares_R(twin)
    steps(twin, other, 1)
    assert not torch.equal(
        twin.encoder.layer[0].intermediate.dense.R, model.encoder.layer[0].intermediate.dense.R
    )


def test_a_copied_optimizer_alone_leaves_the_original_at_work():
    model = dbpkern.decorrelate(make("timm"))
    decor = decor_sgd(model, sample=1.0)
    copy.deepcopy(decor)
    model(images()).square().mean().backward()
    assert captured(decor).keys() == decorrelated(model).keys()


# Refusals.


class Child(nn.Linear):
    pass


def tied():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


def pruned():
    model = nn.ModuleDict({"a": nn.Linear(3, 4)})
    prune.l1_unstructured(model["a"], "weight", amount=0.5)
    return model


def converted():
    return dbpkern.decorrelate(timm_vit())


def encoder():
    return nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(8, 2, 16)})


def separate():
    return nn.ModuleDict({"norm": nn.Linear(2, 2, bias=False), "attn": nn.MultiheadAttention(4, 2, kdim=3)})


def grouped():
    return nn.ModuleDict({"first": nn.Linear(3, 3), "patch_embed": nn.Conv2d(4, 4, 2, 2, groups=2)})


REFUSALS = {
    "unknown site": (
        timm_vit,
        {"sites": "mlp"},
        r"sites: expected a preset \('sublayers', 'all'\) .* got 'mlp'",
    ),
    "sites by measurement": (timm_vit, {"sites": "auto"}, "got 'auto'"),
    "unknown site among known": (timm_vit, {"sites": ("qkv", "fc3")}, "fc3"),
    "no sites": (timm_vit, {"sites": ()}, r"sites: expected .* got \(\)"),
    "site that matches nothing": (
        lambda: nn.ModuleDict({"attn": nn.Linear(3, 3), "mlp": nn.ModuleDict({"fc1": nn.Linear(3, 3)})}),
        {"sites": ("qkv", "fc2")},
        r"site 'fc2' matches no layer of this model; it has qkv: 1 \(attn, ...\); fc1: 1 \(mlp.fc1, ...\)",
    ),
    "no site at all": (
        lambda: nn.ModuleDict({f"part{i}": nn.Linear(2, 2) for i in range(10)}),
        {},
        r"none of the known sites; .* choose: part0, part1, .*part7, \.\.\.$",
    ),
    "no layer at all": (lambda: nn.ModuleDict({"a": nn.ReLU()}), {}, "could choose: none"),
    "filter without sites missing": (timm_vit, {"sites": None}, r"sites=None: expected a filter"),
    "filter leaving nothing": (
        timm_vit,
        {"filter": lambda n, m: False},
        "the filter leaves no layer; .* qkv: 2",
    ),
    "unknown form": (timm_vit, {"form": "fused"}, "form: expected one of .* got 'fused'"),
    "converted already": (converted, {"sites": "fc2"}, r"decorrelated already \(patch_embed.proj and 4 more"),
    "projection inside attention": (
        MODELS["torchvision"],
        {"sites": "all"},
        "site 'proj': nn.MultiheadAttention",
    ),
    "out_proj by filter": (
        MODELS["torchvision"],
        {"sites": None, "filter": everything},
        "NonDynamicallyQuant",
    ),
    "encoder layer's attention": (
        encoder,
        {"sites": "qkv"},
        "TransformerEncoderLayer reads this layer's weight",
    ),
    "encoder layer's linear": (
        encoder,
        {"sites": None, "filter": lambda n, m: n.endswith("linear1")},
        "encoder.linear1: TransformerEncoderLayer reads this layer's weight without calling",
    ),
    "tied weights": (
        tied,
        {"sites": None, "filter": everything},
        "head: its weight is tied to embedding.weight",
    ),
    "pruned weights": (pruned, {"sites": None, "filter": everything}, "a: its weight is not a Parameter"),
    "subclass": (
        lambda: nn.ModuleDict({"a": nn.Linear(2, 2), "b": Child(2, 2)}),
        {"sites": None, "filter": everything},
        r"b: expected exactly nn.Linear, .* got test_convert.Child",
    ),
    "grouped convolution": (grouped, {"sites": "patch_embed"}, "expected groups=1, got groups=2"),
    "grouped convolution after others": (grouped, {"sites": None, "filter": everything}, "groups=1"),
    "separate projections": (separate, {"sites": "qkv"}, "expected one in_proj_weight .* got kdim=3, vdim=4"),
    "the model itself": (
        lambda: nn.Linear(3, 3),
        {"sites": None, "filter": everything},
        "the model itself is a Linear, which cannot be replaced in place; use DecorLinear.from_linear",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why_and_leave_the_model_alone(case):
    make_model, arguments, match = REFUSALS[case]
    model = make_model()
    modules = list(model.modules())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        convert(model, **arguments)
    assert len(modules) == len(list(model.modules()))
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_cross_attention_can_be_kept_out():
    model = nn.TransformerDecoderLayer(8, 2, 16)
    convert(model, sites=None, filter=lambda name, _: name == "self_attn")
    x = torch.randn(3, 2, 8)
    assert model(x, torch.randn(5, 2, 8)).shape == x.shape


@pytest.mark.parametrize("model", [timm_vit(), nn.Linear(2, 2)], ids=["vit", "linear"])
def test_fusing_an_unconverted_model_is_refused(model):
    with pytest.raises(ValueError, match="expected a model with decorrelated layers, found none"):
        dbpkern.fuse(model)


def test_fusing_a_layer_itself_is_refused():
    layer = shake(DecorLinear.from_linear(nn.Linear(3, 3)))
    weight = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"call its fused\(\) instead"):
        dbpkern.fuse(layer)
    identical(layer.weight, weight)
