"""The measuring tools: baselines against the specification, statistics, byte counts, and the gate."""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dbpkern
from bench import arms, baselines, cases, check, measure, record
from bench.__main__ import main
from bench.cases import Case
from dbpkern import reference

TINY = ["--case", "vit", "--width", "32", "--depth", "1", "--batch", "4"]
# 4 images of 49 patches and a class token; a tenth of 196 patches and of 200 tokens is sampled.
WIDTH, PATCHES, TOKENS, PATCH_VALUES, SAMPLED = 32, 196, 200, 768, 20
DEFAULT = [("DecorAdamW", "mixed"), ("DecorPreconditioner", "mixed"), ("DecorPreconditioner", "low")]
ARMS = [("plain", None), *DEFAULT]
ARMS += [(m, s) for s in ("sublayers", "all") for m in ("full", "layers", "published")]
# Width, outputs and rank of every layer of the one block, by default: a rank is a multiple of 8.
LAYERS = {
    "patch_embed": (PATCH_VALUES, WIDTH, 64),
    "qkv": (WIDTH, 3 * WIDTH, 8),
    "proj": (WIDTH, WIDTH, 8),
    "fc1": (WIDTH, 4 * WIDTH, 8),
    "fc2": (4 * WIDTH, WIDTH, 8),
}
CPU = torch.device("cpu")
TORCH = torch.__version__.partition("+")[0]
ROOT = Path(__file__).parents[2]


def near_identity(d: int) -> torch.Tensor:
    return torch.eye(d, dtype=torch.float64) + 0.1 * torch.randn(d, d, dtype=torch.float64)


@pytest.mark.parametrize("kappa", [0.0, 0.3])
class TestPublished:
    def test_linear(self, kappa: float):
        stock = nn.Linear(6, 4).double()
        layer = baselines.PublishedLinear(stock, lambda n: torch.tensor([3, 0, 3, n - 1]))
        layer.R.copy_(near_identity(6))
        x, R = torch.randn(2, 5, 6, dtype=torch.float64), layer.R.clone()
        torch.testing.assert_close(layer(x), x @ R.T @ stock.weight.T + stock.bias)
        rows = x.reshape(10, 6)[[3, 0, 3, 9]]
        loss = layer.update(0.05, kappa)
        torch.testing.assert_close(layer.R, reference.published_step(R, rows, 0.05, kappa))
        torch.testing.assert_close(loss, reference.loss((rows @ R.T)[None], kappa)[0])

    def test_convolution(self, kappa: float):
        stock = nn.Conv2d(3, 4, (2, 3), stride=(2, 3)).double()
        layer = baselines.PublishedConv2d(stock, lambda n: torch.tensor([n - 1, 0, 0]))
        layer.R.copy_(near_identity(18))
        x, R = torch.randn(3, 3, 4, 6, dtype=torch.float64), layer.R.clone()
        patches = F.unfold(x, (2, 3), stride=(2, 3)).mT  # [3, 4, 18]
        expected = patches @ R.T @ stock.weight.flatten(1).T + stock.bias
        torch.testing.assert_close(layer(x).flatten(2).mT, expected)
        rows = patches[[2, 0, 0]].flatten(0, 1)
        loss = layer.update(0.05, kappa)
        torch.testing.assert_close(layer.R, reference.published_step(R, rows, 0.05, kappa))
        torch.testing.assert_close(loss, reference.loss((rows @ R.T)[None], kappa)[0])

    def test_model(self, kappa: float):
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        weights = list(model.parameters())
        assert baselines.published_convert(model, ["0", "2"], lambda n: torch.arange(n)) is model
        assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
        x = torch.randn(7, 6, dtype=torch.float64)
        model(x).sum().backward()
        inputs = [x, torch.tanh(F.linear(x, *weights[:2]))]
        loss = baselines.published_update(model, 0.05, kappa)
        for layer, rows in zip(baselines.published_layers(model).values(), inputs, strict=True):
            eye = torch.eye(rows.shape[1], dtype=torch.float64)
            torch.testing.assert_close(layer.R, reference.published_step(eye, rows, 0.05, kappa))
        assert isinstance(loss, float)
        assert loss == pytest.approx(
            sum(reference.loss(rows.detach()[None], kappa).item() for rows in inputs)
        )


def test_published_sample():
    index = baselines.draw_rows(1000)
    assert index.shape == (100,)
    assert index.device.type == "cpu"
    assert index.min() >= 0
    assert index.max() < 1000
    assert len(index.unique()) < 100  # with replacement
    assert baselines.draw_rows(3).shape == (1,)


def test_both_methods_convert_the_same_layers():
    case = Case("mae50", 32, 1, 1, 1)
    inputs = case.inputs(CPU, torch.float32)
    for sites in ("sublayers", "all"):
        ours, published = (
            arms.Arm(case, method, sites, inputs, "fp32") for method in ("layers", "published")
        )
        names = [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        expected = ["patch_embed.proj", *(names if sites == "all" else names[::2])]
        assert list(ours.R()) == list(published.R()) == expected


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("vit", 50), ("mae50", 50), ("mae197", 197), ("darl", 49), ("segment", 65), ("segment-linear", 65)],
)
def test_cases_have_the_tokens_they_state(name: str, tokens: int):
    case = Case(name, 32, 1, 2, 1)
    model, seen = case.build(), []
    encoder = model.segmentation.encoder if case.segments else model
    encoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    loss, _ = model(*case.inputs(CPU, torch.float32))
    assert seen == [(2, tokens, 32)]
    assert case.tokens == tokens
    assert loss.isfinite()
    assert loss.requires_grad


def test_segmentation_computes_what_the_published_rule_does():
    differences = check.compare(Case("segment", 32, 1, 3, 1), "all", CPU, "fp64")
    assert max(differences.values()) < check.TOLERANCES["fp64"]


def test_cases_without_their_package_are_left_out_and_named(monkeypatch, capsys):
    assert cases.default_cases() == list(cases.CASES)
    monkeypatch.setattr(cases.importlib.util, "find_spec", lambda name: None)
    assert cases.default_cases() == ["vit", "mae50", "mae197", "darl", "darl-diffusion"]
    assert main(["step", "--case", "segment", "--batch", "2"]) == 2
    assert "--case segment needs segmentation-models-pytorch" in capsys.readouterr().err


def test_upernet_takes_no_single_image(capsys):
    assert main(["step", "--case", "segment", "--batch", "1"]) == 2
    assert "--batch: segment needs at least 2 images" in capsys.readouterr().err


def test_a_decoder_of_many_times_the_encoder_has_a_smaller_batch_by_default():
    args = argparse.Namespace(
        case=["vit", "segment"], device=CPU, width=None, depth=None, batch=None, decoder_depth=2,
        tokens={"cpu": 6400},
    )  # fmt: skip
    assert [case.batch for case in cases.from_arguments(args)] == [128, 12]


def test_rounds_rotate():
    calls = []
    steps = [lambda i=i: calls.append(i) for i in range(3)]

    def call(step) -> float:
        step()
        return 10.0 * calls[-1]

    for turn in range(4):
        assert measure.rotated_round(steps, turn, call) == [0.0, 10.0, 20.0]
    assert calls == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]


def test_paired_ratio():
    # Ratios 2, 2, 3, 4: not the ratio of the medians, 11 / 3.5.
    assert measure.paired_ratio([2, 4, 18, 32], [1, 2, 6, 8]) == (2.0, 2.5, 3.25)
    assert measure.paired_ratio([3.0], [2.0]) == (1.5, 1.5, 1.5)


def test_seconds_is_the_mean_of_the_inner_steps(monkeypatch):
    clock = iter([1.0, 7.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = []
    assert measure.seconds(lambda: calls.append(0), CPU, inner=3) == 2.0
    assert len(calls) == 3


def test_allocations_are_exact():
    with measure.Allocations(CPU) as memory:
        kept = torch.empty(1000)
        with memory.phase("first"):
            torch.empty(500)
            torch.empty(300)
        with memory.phase("second"):
            other = torch.empty(100)
        with memory.phase("third"):
            del kept
            # Scratch that never leaves an operator: the sum of a product through a float64 copy.
            other.double().sum()
    assert memory.spans == {"first": (4000, 6000), "second": (4000, 4400), "third": (4400, 4400)}


def test_saved_storages_count_once_and_leave_out_the_known():
    x, weight = torch.randn(10, 10), torch.randn(10, 10, requires_grad=True)
    with measure.saved_storages([x, weight]) as found:
        y = (x @ weight).exp()  # saves its result
        (y[:5].square() * y[5:]).sum()  # saves parts of it again, and a new square [5, 10]
    assert sorted(found.values()) == [200, 400]


def test_table_lines_up():
    text = record.table(("a", "sites", "s"), [("plain", "-", "1.5"), ("x", "all", "12")])
    assert text.splitlines() == [
        "| a     | sites |   s |",
        "| ----- | ----- | --: |",
        "| plain | -     | 1.5 |",
        "| x     | all   |  12 |",
    ]


def check_header(record: dict):
    assert record["machine"]["dbpkern"] == dbpkern.__version__
    assert record["machine"]["packages"]["torch"].startswith(TORCH)
    assert {"commit", "cpu", "threads"} <= set(record["machine"])
    assert record["precision"] == "fp32"
    assert record["date"].startswith("20")
    assert record["command"].startswith("python -m bench ")


def test_step(tmp_path, capsys):
    path = tmp_path / "step.json"
    assert main(["step", *TINY, "--rounds", "2", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    check_header(written)
    (result,) = written["results"]
    assert result["sizes"]["tokens"] == 50
    assert max(result["differences"]["fp64"].values()) < 1e-9
    found = {(arm["arm"], arm["sites"]): arm for arm in result["arms"]}
    assert list(found) == ARMS
    plain, ours = found["plain", None], found["layers", "sublayers"]
    for arm in found.values():
        assert len(arm["seconds"]) == 2
        assert arm["time_ratio"]["low"] <= arm["time_ratio"]["median"] <= arm["time_ratio"]["high"]
        assert arm["peak_bytes"] >= plain["peak_bytes"]
    assert set(plain["time_ratio"].values()) == {1.0}

    # By hand: forward, gradient of weights and, except for the images, of the input.
    linear = 3 * 2 * (TOKENS * 12 * WIDTH**2 + 4 * WIDTH * 1000)
    convolution = 2 * 2 * PATCHES * PATCH_VALUES * WIDTH
    attention = (2 + 5) * 2 * 4 * 50**2 * WIDTH  # two products, five in the backward
    # Not every torch counts its attention for the CPU.
    assert plain["flops"] - linear - convolution in (0, attention)
    # Fold and its gradient; z, its correlations M, whose bound the limiter needs, and M R.
    sizes = ((PATCH_VALUES, WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, 4 * WIDTH))  # patch embedding, qkv, fc1
    extra = sum((4 * o + 4 * SAMPLED) * d**2 + 2 * d**3 for d, o in sizes)
    assert ours["flops"] - plain["flops"] == extra
    # The gradient's way in and the change's way out; z, G and M R.
    extra = sum((4 * o + 4 * SAMPLED) * d**2 + 2 * d**3 for d, o in sizes)
    assert found["full", "sublayers"]["flops"] - plain["flops"] == extra
    # With low ranks g Q S^T Q^T, and for the change the same; or, around an optimizer, V Q before it and
    # after, then S and Q^T. In every second step the update.
    for method, ranks in DEFAULT:
        products = 8 if method == "DecorAdamW" else 10
        extra = {
            site: products * o * d * r + 4 * o * r**2
            + (4 * SAMPLED * d * r + 2 * SAMPLED * r**2 + 16 * d * r**2 + 35 * r**3) / 2
            for site, (d, o, r) in LAYERS.items()
        }  # fmt: skip
        if ranks == "mixed":
            d, o, _ = LAYERS["qkv"]
            extra["qkv"] = 4 * o * d**2 + (4 * SAMPLED * d**2 + 2 * d**3) / 2
        assert found[method, ranks]["flops"] - plain["flops"] == sum(extra.values())

    assert main(["step", *TINY, "--count", "--json", str(path)]) == 0
    counted = json.loads(path.read_text())["results"][0]["arms"]
    assert {(arm["arm"], arm["sites"]): arm["flops"] for arm in counted} == {
        arm: counts["flops"] for arm, counts in found.items()
    }
    assert not any("seconds" in arm for arm in counted)

    out = capsys.readouterr().out
    assert f"torch {TORCH}" in out.splitlines()[0]
    for method, sites in ARMS:
        assert f"| {method:19} | {sites or '-':14} |" in out


def test_memory(tmp_path):
    """As a stranger runs it, in a process of its own."""
    path = tmp_path / "memory.json"
    command = [sys.executable, "-m", "bench", "memory", *TINY, "--threads", "1", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    written = json.loads(path.read_text())
    check_header(written)
    (result,) = written["results"]
    found = {(arm["arm"], arm["sites"]): arm["bytes"] for arm in result["arms"]}
    assert list(found) == ARMS
    model = Case("vit", WIDTH, 1, 4, 2).build()
    weights = 4 * sum(p.numel() for p in model.parameters())
    for (method, sites), counts in found.items():
        inner = {None: (), "sublayers": (WIDTH, WIDTH)}.get(sites, (WIDTH, WIDTH, WIDTH, 4 * WIDTH))
        widths = (PATCH_VALUES, *inner) if sites else ()
        R = {site: d * r + r**2 for site, (d, _, r) in LAYERS.items()} if sites in ("mixed", "low") else {}
        if sites == "mixed":
            R["qkv"] = WIDTH**2
        assert counts["parameters"] == counts["gradients"] == weights
        assert counts["optimizer"] == 2 * weights + 4 * len(list(model.parameters()))  # and step counters
        assert counts["R"] == 4 * (sum(R.values()) if R else sum(d * d for d in widths))
        # The published convolution keeps its images, which are the batch, instead of rows.
        sampled = inner if method == "published" else widths
        assert counts["samples"] == 4 * SAMPLED * sum(sampled)
        states = ("parameters", "gradients", "optimizer", "R", "samples")
        assert counts["peak"] >= sum(counts[part] for part in states) - counts["gradients"]
        assert counts["peak"] == max(counts["phase_peaks"].values())
    plain, ours = found["plain", None], found["layers", "sublayers"]
    assert plain["scratch"] == 0
    # The folded weights of patch embedding, qkv and fc1 are kept for the backward, and nothing else.
    assert ours["saved"] - plain["saved"] == 4 * (PATCH_VALUES * WIDTH + (3 + 4) * WIDTH**2)
    # Around the optimizer nothing: sampled rows lie in the stacks, which live on.
    assert found["full", "sublayers"]["saved"] == plain["saved"]
    assert "| published           | all            |" in done.stdout


def _full_too_fast(model, decor):
    return RIGHT["DecorSGD"](model, replace(decor, eta=1.01 * decor.eta))


def _low_too_fast(model, optimizer, decor):
    factor = 1.01 if isinstance(decor.rank, dict) else 1.0  # the gate has a rank for each layer
    return RIGHT["DecorPreconditioner"](model, optimizer, replace(decor, eta=factor * decor.eta))


RIGHT = {name: getattr(dbpkern, name) for name in ("DecorSGD", "DecorPreconditioner")}


@pytest.mark.parametrize("command", ["step", "memory"])
@pytest.mark.parametrize(
    ("name", "wrong"), [("DecorSGD", _full_too_fast), ("DecorPreconditioner", _low_too_fast)]
)
def test_a_wrong_rate_is_found(command, name, wrong, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dbpkern, name, wrong)
    path = tmp_path / "record.json"
    assert main([command, *TINY, "--json", str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nothing was measured" in captured.err
    assert "differ by" in captured.err
    assert not path.exists()


def test_a_wrong_layer_is_found(capsys, monkeypatch):
    forward = baselines.PublishedConv2d.forward
    monkeypatch.setattr(baselines.PublishedConv2d, "forward", lambda layer, x: forward(layer, x) + 1e-6)
    assert main(["step", *TINY]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "published computes another output than plain" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "NAME"),
        (["steps"], "invalid choice: 'steps'"),
        (["step", "--case", "resnet"], "invalid choice: 'resnet'"),
        (["step", "--width", "100"], "expected a multiple of 64"),
        (["step", "--rounds", "0"], "expected a positive number, got 0"),
        (["step", "--device", "tpu"], "expected cpu or cuda, got tpu"),
        (["step", "--json", "no/such/folder/file.json"], "there is no folder no/such/folder"),
        (["memory", "--rounds", "3"], "unrecognized arguments"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_missing_gpu(capsys):
    with pytest.raises(SystemExit):
        main(["step", "--device", "cuda"])
    assert "no CUDA device" in capsys.readouterr().err
