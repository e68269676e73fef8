"""Observed statistics against their definition, and plots that show something."""

import matplotlib.image
import numpy as np
import pytest
import torch
from rules import convert, decor_sgd, preconditioner
from torch import nn
from vits import MODELS, decorrelated, everything, images, make, mlp, shake

import dbpkern
from dbpkern import diagnostics
from train.engine import correlations

pytestmark = pytest.mark.filterwarnings("error")

NAMES = {
    "timm": ("patch_embed.proj", "blocks.1.attn.qkv", "blocks.0.mlp.fc1"),
    "torchvision": (
        "conv_proj",
        "encoder.layers.encoder_layer_1.self_attention",
        "encoder.layers.encoder_layer_0.mlp.0",
    ),
    "huggingface": (
        "embeddings.patch_embeddings.projection",
        "encoder.layer.1.attention.attention.key",
        "encoder.layer.0.intermediate.dense",
    ),
}


def numbers(x, R):
    """Everything that a Layer tells, by numpy from the rows x and R."""
    x, R = x.detach().double().numpy(), R.detach().double().numpy()
    facts = {"rows": len(x), "condition_R": np.linalg.cond(R)}
    for when, rows in (("before", x), ("after", x @ R.T)):
        G = np.einsum("ni,nj->ij", rows, rows) / len(rows)
        scale = np.sqrt(np.diag(G))
        off = G - np.diag(np.diag(G))
        facts |= {
            when: G,
            f"loss_{when}": (off**2).mean(),
            f"correlation_{when}": np.sqrt(((off / np.outer(scale, scale)) ** 2).mean()),
            f"variance_{when}": (rows**2).mean(0),
            f"condition_{when}": np.linalg.cond(G) if len(rows) >= len(G) else np.inf,
        }
    return facts


def agrees(layer, x, R):
    for name, expected in numbers(x, R).items():
        np.testing.assert_allclose(getattr(layer, name), expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["stock", "layers", "around"])
@pytest.mark.parametrize("kind", MODELS)
def test_statistics_by_their_definition(kind, method):
    model = make(kind).eval()
    held = {}
    if method == "layers":
        shake(dbpkern.decorrelate(model))
        held = decorrelated(model)
    elif method == "around":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        held = preconditioner(model, optimizer, sites="sublayers", rank=None).layers
        for layer in held.values():
            for factor in layer.factors:
                factor.add_(0.1 * torch.randn_like(factor))
            assert not torch.allclose(layer.dense_R(), torch.eye(len(layer.dense_R())), atol=0.01)
    rows = {name: [] for name in NAMES[kind]}
    for name in rows:
        module = model.get_submodule(name)
        flat = nn.Unfold(8, stride=8) if isinstance(module, nn.Conv2d) else nn.Identity()
        module.register_forward_pre_hook(
            lambda _, args, name=name, flat=flat: rows[name].append(
                (flat(args[0]).mT if args[0].dim() == 4 else args[0]).flatten(0, 1)
            )
        )
    with torch.no_grad(), diagnostics.observe(model) as layers:
        for n in (9, 5):
            model(images(n))
    seen = {name: len(parts) for name, parts in rows.items()}
    assert seen == dict.fromkeys(rows, 2)
    for name, parts in rows.items():
        x = torch.cat(parts)
        R = held[name].dense_R() if held else torch.eye(x.shape[1])
        assert layers[name].name == name
        agrees(layers[name], x, R)
    with torch.no_grad():
        model(images(1))
    assert layers[name].rows == len(x)  # the hooks are gone


def test_layers_come_in_the_models_order():
    model = make("timm")
    with diagnostics.observe(model) as layers:
        pass
    converted = dbpkern.decorrelate(make("timm"))
    assert list(layers) == list(decorrelated(converted))
    with diagnostics.observe(model, "all", lambda name, _: "mlp" in name) as layers:
        pass
    assert list(layers) == [f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)]
    with diagnostics.observe(converted, filter=lambda name, _: "qkv" in name) as layers:
        pass
    assert list(layers) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]


def test_observing_leaves_the_model_alone():
    model, x = make("timm").eval(), images(2)
    types = [type(m) for m in model.modules()]
    expected = model(x)
    with diagnostics.observe(model):
        assert torch.equal(model(x), expected)
    assert [type(m) for m in model.modules()] == types
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_hooks_go_also_after_an_error():
    model = make("timm")
    with pytest.raises(KeyError, match="mine"), diagnostics.observe(model):
        raise KeyError("mine")
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_R_is_the_one_at_the_start(dtype):
    model = shake(mlp(5, 4, dtype=dtype))
    R, x = model[0].R.clone(), torch.randn(9, 5, dtype=dtype)
    with diagnostics.observe(model) as layers:
        model(x)
        model[0].R.zero_()
    agrees(layers["0"], x, R)


def test_inputs_by_keyword_and_empty_inputs_count():
    model, x = mlp(5, 4), torch.randn(9, 5)
    with diagnostics.observe(model) as layers:
        model[0](x=x)
        model[0](torch.randn(0, 5))
    agrees(layers["0"], x, torch.eye(5))


def test_fewer_rows_than_features_have_no_condition_number():
    model = mlp(5, 4)
    with diagnostics.observe(model) as layers:
        model(torch.randn(4, 5))
    assert layers["0"].condition_before == layers["0"].condition_after == float("inf")
    with diagnostics.observe(model) as layers:
        model(torch.randn(5, 5))
    assert 1 < layers["0"].condition_before < float("inf")
    assert 1 < layers["0"].condition_after < float("inf")
    with diagnostics.observe(model) as layers:
        pass
    assert layers["0"].rows == 0
    assert layers["0"].loss_before == 0


def test_dead_features_have_no_correlation():
    x = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0]])
    model = mlp(3, 2)
    with diagnostics.observe(model) as layers:
        model(x)
    expected = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).double()
    torch.testing.assert_close(diagnostics.correlations(layers["0"].before), expected)
    assert layers["0"].correlation_before == pytest.approx((2 / 9) ** 0.5)


def test_decorrelation_shows():
    model, x = mlp(6, 4), torch.randn(200, 6) @ torch.randn(6, 6)
    decor = decor_sgd(model, eta=0.01, sample=1.0)
    for _ in range(100):
        model(x).sum().backward()
        decor.step()
    with diagnostics.observe(model) as layers:
        model(x)
    layer = layers["0"]
    assert layer.loss_after < 0.1 * layer.loss_before
    assert layer.correlation_after < layer.correlation_before
    assert layer.condition_R > 1


@pytest.mark.parametrize(
    ("make_model", "arguments", "match"),
    [
        (lambda: make("timm"), {"sites": "mlp"}, "sites: expected a preset"),
        (lambda: make("timm"), {"sites": None}, "expected a filter"),
        (lambda: make("timm"), {"filter": lambda n, m: False}, "the filter leaves no layer"),
        (
            lambda: make("torchvision"),
            {"sites": None, "filter": everything},
            "NonDynamicallyQuantizableLinear",
        ),
        (
            lambda: nn.ModuleDict({"a": nn.Linear(2, 2), "patch_embed": nn.Conv2d(2, 2, 2, 2, groups=2)}),
            {"sites": None, "filter": everything},
            "groups=1",
        ),
    ],
)
def test_refusals_leave_no_hook(make_model, arguments, match):
    model = make_model()
    with pytest.raises(ValueError, match=match), diagnostics.observe(model, **arguments):
        pass
    assert not any(m._forward_pre_hooks for m in model.modules())


# Plots.


@pytest.fixture(scope="module")
def observed():
    torch.manual_seed(0)
    model = shake(convert(make("timm"), sites="all"))
    with torch.no_grad(), diagnostics.observe(model) as layers:
        model(images(4))
    return layers


def history():
    return {name: {step: 1 / (step + i + 1) for step in range(0, 50, 10)} for i, name in enumerate("abc")}


PLOTS = {
    "correlations": lambda layers, path: correlations.plot_correlations(layers, path),
    "layers": lambda layers, path: correlations.plot_layers(layers, path),
    "losses": lambda layers, path: correlations.plot_losses(history(), path, title="A run"),
}


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_are_written(plot, observed, tmp_path):
    path = tmp_path / "plot.png"
    PLOTS[plot](observed, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = matplotlib.image.imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 300
    colours = np.unique((pixels.reshape(-1, 3) * 255).astype(int), axis=0)
    assert len(colours) > 50
    inked = (pixels < 0.9).any(-1)
    assert 0.01 < inked.mean() < 0.9


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_need_no_file(plot, observed):
    assert PLOTS[plot](observed, None).axes


def test_correlation_plots_show_the_matrices(observed):
    figure = correlations.plot_correlations(observed, limit=3, features=10)
    axes = [axis for axis in figure.axes if axis.images and axis.get_title()]
    assert len(axes) == 2 * 3
    chosen = [list(observed)[i] for i in (0, 4, 8)]  # spread over the model's 9 layers
    assert [axis.get_title().partition("\n")[0] for axis in axes[::2]] == chosen
    for axis, other, name in zip(axes[::2], axes[1::2], chosen, strict=True):
        layer = observed[name]
        for image, matrix in ((axis.images[0], layer.before), (other.images[0], layer.after)):
            np.testing.assert_allclose(image.get_array(), diagnostics.correlations(matrix)[:10, :10])
        assert f"{layer.correlation_before:.3f}" in axis.get_title()
        assert f"{layer.correlation_after:.3f}" in other.get_title()


def test_one_layer_can_be_plotted(observed):
    name = next(iter(observed))
    for limit in (1, 8):
        figure = correlations.plot_correlations({name: observed[name]}, limit=limit)
        assert sum(bool(axis.get_title()) for axis in figure.axes) == 2
    assert len(correlations.plot_layers({name: observed[name]}).axes) == 3
    assert len(correlations.plot_losses({"a": {0: 1.0}}).axes[0].lines) == 1


def test_layer_plots_show_the_numbers(observed):
    figure = correlations.plot_layers(observed)
    for axis, name in zip(figure.axes, ("loss", "variance", "condition"), strict=True):
        for line, when in zip(axis.lines, ("before", "after"), strict=True):
            values = [torch.as_tensor(getattr(layer, f"{name}_{when}")).mean() for layer in observed.values()]
            np.testing.assert_allclose(line.get_ydata(), values)
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == list(observed)


def test_loss_plots_show_the_numbers():
    (axis,) = correlations.plot_losses(history()).axes
    assert {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axis.lines} == history()


@pytest.mark.parametrize(
    "plot", [correlations.plot_correlations, correlations.plot_layers, correlations.plot_losses]
)
def test_nothing_to_plot_is_an_error(plot, tmp_path):
    with pytest.raises(ValueError, match="at least one layer"):
        plot({}, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
