"""Segmentation without a run: figures from their definition, rates by layer, the recipe of the presets."""

import csv

import numpy as np
import pytest
import torch
from runs import ALONE, CONFIGS
from segment_runs import by_definition
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

import dbpkern
from models.classifier import Architecture, create_vit
from models.segmentation import SegmentationModel
from train import segment
from train.data.masks import IGNORE
from train.engine import plots
from train.engine.processes import Processes
from train.engine.schedule import warmup_linear
from train.tasks import segmentation, transfer

SIZES = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


# The optimizer


@pytest.mark.parametrize("decor", [False, True])
def test_muon_trains_a_segmenter_with_the_same_rates_by_layer(decor):
    encoder = create_vit(Architecture("mae_vit_tiny", 32, SIZES | {"depth": 2}), dynamic_img_size=True)
    model = SegmentationModel(encoder, 3, width=8)
    arguments = ["--out=x", "--head=linear", "--optim.name=muon", f"--decor.enable={str(decor).lower()}"]
    config = segment.parse(arguments)
    optimizer, held = transfer.build_optimizers(config, model)
    assert isinstance(optimizer, dbpkern.DecorMuon)
    assert (held is optimizer, optimizer.engine is not None) == (decor, decor)
    assert {group["momentum"] for group in optimizer.param_groups} == {config.optim.betas[0]}
    assert len({group["initial_lr"] for group in optimizer.param_groups}) == 4


def test_the_rate_rises_and_falls_in_lines():
    rates = [warmup_linear(step, 10, 4, 1.0, 0.1) for step in range(11)]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert rates[4:] == pytest.approx([1 - 0.15 * i for i in range(7)])


def test_rates_decay_over_the_encoder_alone():
    encoder = create_vit(Architecture("mae_vit_tiny", 32, SIZES | {"depth": 12}), dynamic_img_size=True)
    model = SegmentationModel(encoder, 3, width=8)
    config = segment.parse(["--out=x"])
    assert config.peak_lr == pytest.approx(1e-4)
    assert (config.head, config.steps, config.optim.warmup_steps) == ("upernet", 160_000, 1500)
    optimizer, _ = transfer.build_optimizers(config, model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert set(found) == set(names.values())
    for name, group in found.items():
        part, _, rest = name.partition(".")
        layer = 13
        if part == "encoder":
            layer = int(rest.split(".")[1]) + 1 if rest.startswith("blocks") else 0
        assert group["lr_scale"] == pytest.approx(0.65 ** (13 - layer)), name
        assert group["initial_lr"] == pytest.approx(1e-4 * 0.65 ** (13 - layer)), name
        free = rest in ("cls_token", "pos_embed") or model.get_parameter(name).ndim == 1
        assert group["weight_decay"] == (0 if free else 0.05), name


@pytest.mark.parametrize("preset", ["segment_mae_base", "segment_darl_base"])
def test_presets_are_the_recipe(preset):
    config = segment.parse([f"--config={CONFIGS / preset}.yaml", "--data.source=ade20k:x", "--out=x"])
    config.check(Processes(0, 8, torch.device("cuda")))
    total, rate = config.schedule(20_210)
    assert (total, config.batch_size, config.img_size) == (160_000, 16, 512)
    assert [rate(step) for step in (0, 750, 1500, 160_000)] == pytest.approx([0, 5e-5, 1e-4, 0])
    assert (config.optim.layer_decay, config.optim.weight_decay, config.drop_path) == (0.65, 0.05, 0.1)
    assert config.evaluation.windows((512, 512)) == (341, 341)
    assert segmentation.EvaluationConfig().windows((512, 512)) == (341, 341)
    assert config.data.short_side == 512


def test_batch_norms_of_several_processes_share_their_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert segmentation.synchronise(model, ALONE) is model
    assert not model[1]._forward_hooks
    on_cpus = segmentation.synchronise(model, Processes(0, 2, torch.device("cpu")))
    assert len(on_cpus[1]._forward_hooks) == 1
    on_gpus = segmentation.synchronise(model, Processes(0, 2, torch.device("cuda")))
    assert isinstance(on_gpus[1], nn.SyncBatchNorm)


# Figures


@pytest.mark.parametrize("case", ["random", "absent", "predicted alone", "ignored", "perfect"])
def test_figures_are_those_of_their_definition(case):
    rng = np.random.default_rng(0)
    masks = [rng.integers(0, 4, size) for size in ((5, 7), (3, 4), (6, 6))]
    predictions = [rng.integers(0, 4, mask.shape) for mask in masks]
    if case == "absent":
        masks, predictions = ([np.minimum(x, 2) for x in xs] for xs in (masks, predictions))
    if case == "predicted alone":
        masks = [np.minimum(mask, 2) for mask in masks]
    if case == "ignored":
        masks[0][:] = IGNORE
        masks[1][1:] = IGNORE
    if case == "perfect":
        predictions = masks
    expected = by_definition(masks, predictions, 4)
    counts = torch.zeros(4, 4, dtype=torch.int64)
    theirs = MulticlassJaccardIndex(4, ignore_index=IGNORE)
    for mask, prediction in zip(masks, predictions, strict=True):
        pair = torch.from_numpy(prediction), torch.from_numpy(mask)
        counts += segmentation.count_pixels(*pair, 4)
        theirs.update(*pair)
    assert torch.equal(counts, theirs.confmat)
    found = segmentation.score(counts)
    assert found.miou == pytest.approx(100 * theirs.compute().item(), rel=1e-5)
    for name, value in expected.items():
        actual = getattr(found, name)
        actual = actual.numpy() if isinstance(actual, torch.Tensor) else actual
        np.testing.assert_allclose(actual, value, rtol=1e-5, err_msg=name)
    assert found.pixels.tolist() == [sum(int((mask == label).sum()) for mask in masks) for label in range(4)]


def test_a_table_of_classes():
    counts = segmentation.count_pixels(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 3)
    text = segmentation.class_table(("a", "b, c", "d"), segmentation.score(counts))
    assert list(csv.reader(text.splitlines())) == [
        ["class", "iou", "accuracy", "pixels"],
        ["a", "50.00", "100.00", "1"],
        ["b, c", "50.00", "50.00", "2"],
        ["d", "", "", "0"],
    ]


def test_colours_differ_and_ignored_pixels_are_black():
    table = plots.colour_table()
    assert table[IGNORE].tolist() == [0, 0, 0]
    assert table[:4].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]  # as PASCAL VOC's
    assert len({tuple(colour) for colour in table.tolist()}) == 256
