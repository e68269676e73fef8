"""Segmentation: encoders of both classes at any size, three heads, loss, decorrelation."""

import argparse
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rules import convert, decor_sgd, preconditioner
from safetensors.torch import save_file
from segmenters import DARL, MAE, SHALLOW, SIZES, build, encoders, heads, shaken
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dbpkern
from dbpkern.sites import find_sites
from dbpkern.stock import stock_layer
from models import darl, mae
from models.classifier import (
    Architecture,
    classifier_metadata,
    classifier_state_dict,
    create_vit,
    load_encoder,
    to_classifier,
)
from models.segmentation import (
    FeaturePyramid,
    Segmentation,
    SegmentationModel,
    feature_blocks,
    resize_logits,
    segmentation_loss,
    segmenter_state_dict,
)


def darl_file(folder, positions: str, **options) -> tuple[darl.DARL, Architecture]:
    """A DARL model with random weights, and the file of its encoder."""
    model = darl.create_darl("darl_vit_tiny", img_size=32, positions=positions, **options, **SIZES)
    architecture = replace(DARL, positions=positions, **options)
    tensors = {name: tensor.contiguous() for name, tensor in shaken(model).encoder_state_dict().items()}
    save_file(tensors, folder / "encoder.safetensors", metadata=architecture.metadata())
    return model.eval(), architecture


# Encoders.


def test_blocks_are_those_of_the_published_evaluations():
    assert feature_blocks(12) == (3, 5, 7, 11)
    assert feature_blocks(24) == (7, 11, 15, 23)
    for depth in range(1, 50):
        blocks = feature_blocks(depth)
        assert blocks == tuple(sorted(blocks))
        assert blocks[0] >= 0
        assert blocks[-1] == depth - 1


@pytest.mark.parametrize(
    "architecture",
    [MAE, DARL, Architecture("timm:vit_medium_patch16_reg4_gap_256", 64, {"depth": 3, "embed_dim": 64})],
    ids=["VisionTransformer", "Eva", "register tokens"],
)
def test_features_are_those_of_timm_at_the_own_size(architecture):
    stock = shaken(create_vit(architecture)).eval()
    images = torch.randn(2, 3, architecture.img_size, architecture.img_size)
    depth = len(stock.blocks)
    for head, blocks in (("upernet", feature_blocks(depth)), ("linear", (depth - 1,)), ("dpt", (0, 0, 1, 1))):
        encoder = create_vit(architecture, dynamic_img_size=True)
        encoder.load_state_dict(stock.state_dict())
        model = SegmentationModel(encoder, 5, head, blocks=blocks).eval()
        found = model.features(images)
        taken = dict(enumerate(stock.forward_intermediates(images, intermediates_only=True)))
        expected = [taken[block] for block in blocks]
        if head == "linear":
            norm = stock.fc_norm if isinstance(stock.norm, nn.Identity) else stock.norm
            expected = [norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for x in expected]
        assert len(found) == len(expected)
        torch.testing.assert_close(found, expected)
        # Blocks above the last one that is read are gone.
        assert len(encoder.blocks) == 1 + blocks[-1]


@pytest.mark.parametrize("positions", darl.POSITIONS)
@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_darl_encoders_at_any_size(tmp_path, positions, size):
    source, _ = darl_file(tmp_path, positions, rope_temperature=30.0)
    loaded = load_encoder(tmp_path / "encoder.safetensors", dynamic_img_size=True)
    model = SegmentationModel(loaded.model, 5, "linear").eval()
    images = torch.randn(2, 3, *size)
    (found,) = model.features(images)
    if positions == "sincos" and size != (32, 32):
        # They are resampled as learned ones are, for they are trained along.
        table = resample_abs_pos_embed(source.pos_embed, (size[0] // 8, size[1] // 8), (4, 4))
        source = darl.create_darl("darl_vit_tiny", img_size=size, positions="sincos", **SIZES).eval()
        source.load_state_dict({**source.state_dict(), **loaded.model.state_dict(), "pos_embed": table})
    expected = source.features(images)[:, 1:].transpose(1, 2).reshape(found.shape)
    torch.testing.assert_close(found, expected)


@encoders
def test_a_size_to_train_at_resamples_positions_once(architecture):
    images = torch.randn(2, 3, 64, 96)
    torch.manual_seed(1)
    at_run_time = build("upernet", architecture).eval()
    torch.manual_seed(1)
    once = build("upernet", architecture, img_size=(64, 96)).eval()
    state = {name: t for name, t in at_run_time.state_dict().items() if name != "encoder.pos_embed"}
    if architecture is MAE:
        table = at_run_time.encoder.pos_embed
        state["encoder.pos_embed"] = resample_abs_pos_embed(table, (8, 12), (4, 4))
    once.load_state_dict(state)
    torch.testing.assert_close(once(images).logits, at_run_time(images).logits)


def test_encoders_of_classifiers_and_of_facebookresearch_mae(tmp_path):
    images = torch.randn(2, 3, 32, 32)
    vit = shaken(create_vit(MAE))
    architecture = to_classifier(vit, MAE, 3, "mean", layer=2)
    shaken(vit).eval()
    save_file(
        classifier_state_dict(vit),
        tmp_path / "classifier.safetensors",
        metadata=classifier_metadata(vit, architecture, ["a", "b", "c"], "mean", False),
    )
    loaded = load_encoder(tmp_path / "classifier.safetensors", dynamic_img_size=True)
    model = SegmentationModel(loaded.model, 5, "linear").eval()
    (found,) = model.features(images)
    expected = vit.fc_norm(vit.forward_features(images)[:, 1:])
    torch.testing.assert_close(found.flatten(2).mT, expected)

    source = mae.create_mae(
        "mae_vit_tiny", img_size=32, decoder_embed_dim=16, decoder_depth=1, **SIZES
    ).eval()
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "mae.pth")
    loaded = load_encoder(tmp_path / "mae.pth", model="mae_vit_tiny", sizes=SIZES, dynamic_img_size=True)
    model = SegmentationModel(loaded.model, 5, "linear").eval()
    (found,) = model.features(images)
    expected, _, _ = source.forward_encoder(images, 0.0, torch.arange(16.0).expand(2, -1))
    torch.testing.assert_close(found.flatten(2).mT, expected[:, 1:])


# Pyramid and heads.


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32, 64])
def test_the_pyramid_has_strides_4_to_32(side):
    pyramid = FeaturePyramid(4, (side, side)).eval()
    maps = [torch.randn(2, 4, 128 // side, 64 // side) for _ in range(4)]
    out = pyramid(maps)
    assert [list(x.shape) for x in out] == [[2, 4, 128 // s, 64 // s] for s in (4, 8, 16, 32)]
    for stride, x, y in zip((4, 8, 16, 32), maps, out, strict=True):
        if stride == side:
            assert torch.equal(x, y)
        elif stride > side:
            factor = stride // side
            assert torch.equal(y, x.unfold(2, factor, factor).unfold(3, factor, factor).amax((-2, -1)))


def test_the_pyramid_of_the_usual_patches():
    def kinds(pyramid: FeaturePyramid) -> list[list[str]]:
        return [
            [type(m).__name__ for m in scale.modules() if not isinstance(m, nn.Sequential)]
            for scale in pyramid.scales
        ]

    double = "ConvTranspose2d"
    assert kinds(FeaturePyramid(4, (16, 16))) == [
        [double, "BatchNorm2d", "GELU", double],
        [double],
        [],
        ["MaxPool2d"],
    ]
    assert kinds(FeaturePyramid(4, (8, 8))) == [[double], [], ["MaxPool2d"], ["MaxPool2d"]]
    assert [m.kernel_size for m in FeaturePyramid(4, (8, 8)).scales[2:]] == [2, 4]


@encoders
@heads
def test_every_head_gives_logits_of_any_size(head, architecture):
    model = build(head, architecture).double()
    for size in ((32, 32), (1, 5), (33, 71), (64, 40)):
        images = torch.randn(2, 3, *size, dtype=torch.float64)
        model.eval()
        logits, auxiliary = model(images)
        assert auxiliary is None
        assert logits.shape == (2, 5, *size)
        assert logits.isfinite().all()
        # Padding is of zeros, to the right and below, and leaves nothing but its influence.
        rows, columns = model.multiple
        padded = images.new_zeros(2, 3, -(-size[0] // rows) * rows, -(-size[1] // columns) * columns)
        padded[:, :, : size[0], : size[1]] = images
        torch.testing.assert_close(model(padded).logits[..., : size[0], : size[1]], logits)
        # A view in another order of memory is the same images.
        torch.testing.assert_close(model(images.mT.contiguous().mT).logits, logits)
        strided = images.repeat_interleave(2, dim=3)[..., ::2]
        torch.testing.assert_close(model(strided).logits, logits)
        # In evaluation, an image does not depend on others.
        torch.testing.assert_close(model(images[1:]).logits, logits[1:])
        logits, auxiliary = model.train()(images)
        assert logits.shape == (2, 5, *size)
        assert (auxiliary is None) == (head == "linear")
        assert auxiliary is None or auxiliary.shape == logits.shape


@pytest.mark.parametrize("sizes", [{"patch_size": 16}, {"patch_size": 32}, {"patch_size": 4}])
@heads
def test_patches_of_other_sizes(head, sizes):
    model = build(head, replace(MAE, img_size=64, sizes=SIZES | sizes)).eval()
    assert model(torch.randn(1, 3, 50, 64)).logits.shape == (1, 5, 50, 64)


def test_patches_that_have_no_pyramid():
    for patch_size, size in ((14, 28), (12, 24), ((8, 16), 32)):
        architecture = replace(MAE, img_size=size, sizes=SIZES | {"patch_size": patch_size})
        model = build("linear", architecture).eval()
        assert model(torch.randn(2, 3, 30, 45)).logits.shape == (2, 5, 30, 45)
        for head in ("upernet", "dpt"):
            with pytest.raises(ValueError, match=r"patch_size: expected a square patch .*power of two"):
                build(head, architecture)
        with pytest.raises(ValueError, match="power of two"):
            FeaturePyramid(4, model.encoder.patch_embed.patch_size)


def test_the_linear_head_is_one_layer_on_normed_patch_tokens():
    model = build("linear").train()
    images = torch.randn(2, 3, 40, 32)
    tokens = model.encoder.forward_features(images)[:, 1:]
    scores = tokens @ model.classifier.weight.flatten(1).T + model.classifier.bias
    logits = scores.mT.reshape(2, 5, 5, 4)
    expected = F.interpolate(logits, scale_factor=8, mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images).logits, expected)
    # On a plane, bilinear interpolation is exact inside: pixels are squares.
    plane = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resize_logits(plane, (8, 8))[0, 0, 3].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_upernet_reads_the_pyramid_and_the_auxiliary_head_its_third_map():
    model = build("upernet", dropout=0.0).train()
    images = torch.randn(2, 3, 64, 32)
    maps = model.pyramid(model.features(images))
    inputs = []
    model.auxiliary.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    expected = model.classifier(model.decoder([None, None, *maps]))
    logits, auxiliary = model(images)
    torch.testing.assert_close(logits, resize_logits(expected, (64, 32)))
    assert inputs[0].shape == (2, 32, 4, 2)
    torch.testing.assert_close(inputs[0], maps[2])
    torch.testing.assert_close(auxiliary, resize_logits(model.auxiliary(maps[2]), (64, 32)))
    assert [m.p for m in build("upernet").modules() if isinstance(m, nn.Dropout2d)] == [0.1, 0.1]
    assert SegmentationModel(create_vit(MAE, dynamic_img_size=True), 5).width == 32


@encoders
@heads
def test_every_parameter_gets_a_gradient(head, architecture):
    model = build(head, architecture, dropout=0.0).train()
    images, target = torch.randn(2, 3, 40, 64), torch.randint(5, (2, 40, 64))
    segmentation_loss(model(images), target).backward()
    for name, parameter in model.named_parameters():
        # A bias before a norm by batches does nothing, but to be there.
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert name.endswith("bias") or parameter.grad.any(), name


@heads
def test_norms_can_be_synchronised(head):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build(head))
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert bool(norms) == (head != "linear")


def test_a_single_image_cannot_train_upernet():
    model = build("upernet").train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.randn(1, 3, 32, 32))


@heads
def test_wrapped_models_train(head, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = build(head)
        wrapped = DistributedDataParallel(model)
        images, target = torch.randn(2, 3, 32, 32), torch.randint(5, (2, 32, 32))
        for _ in range(2):  # the second raises if the first left a parameter without a gradient
            outputs = wrapped(images)
            assert isinstance(outputs, Segmentation)
            segmentation_loss(outputs, target).backward()
    finally:
        dist.destroy_process_group()


def test_compiled_models_compute_the_same():
    model = build("upernet", SHALLOW, dropout=0.0).train()
    images = torch.randn(2, 3, 40, 32)
    expected = model(images)
    found = torch.compile(model, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "nonsense"}, "head: expected one of upernet, dpt, linear, got 'nonsense'"),
        ({"num_classes": 1}, "num_classes: expected at least 2, got 1"),
        (
            {"blocks": (0, 1, 2)},
            r"blocks: expected 4 of 0 to 3 in ascending order for 'upernet', got \(0, 1, 2\)",
        ),
        ({"blocks": (0, 2, 1, 3)}, "blocks: expected 4"),
        ({"blocks": (0, 1, 2, 4)}, "blocks: expected 4"),
        ({"blocks": (-1, 1, 2, 3)}, "blocks: expected 4"),
        ({"head": "linear", "blocks": (2, 3)}, "blocks: expected 1 of 0 to 3"),
        ({"head": "linear", "width": 16}, "width: expected null for 'linear', got 16"),
        ({"width": 0}, "width: expected at least 1"),
        ({"dropout": 1.0}, "dropout: expected a number from 0 to below 1"),
        ({"img_size": 36}, "divisible by patch_size"),
    ],
)
def test_choices_that_cannot_be_are_refused(options, message):
    encoder = create_vit(MAE, dynamic_img_size=True)
    before = encoder.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        SegmentationModel(encoder, **{"num_classes": 5} | options)
    assert encoder.state_dict().keys() == before


def test_images_and_encoders_of_another_kind_are_refused():
    model = build("linear")
    for shape in ((3, 32, 32), (2, 1, 32, 32), (2, 3, 0, 32)):
        with pytest.raises(ValueError, match=re.escape(f"of shape [B, 3, H, W], got {list(shape)}")):
            model(torch.randn(shape))
    with pytest.raises(ValueError, match="encoder: expected one for images of any size"):
        SegmentationModel(create_vit(MAE), 5)


# Loss.


def test_the_loss_is_cross_entropy_of_both_heads():
    logits, auxiliary = torch.randn(2, 5, 6, 7), torch.randn(2, 5, 6, 7)
    target = torch.randint(5, (2, 6, 7))
    main, other = F.cross_entropy(logits, target), F.cross_entropy(auxiliary, target)
    torch.testing.assert_close(segmentation_loss(Segmentation(logits, None), target), main)
    outputs = Segmentation(logits, auxiliary)
    torch.testing.assert_close(segmentation_loss(outputs, target), main + 0.4 * other)
    torch.testing.assert_close(segmentation_loss(outputs, target.byte()), main + 0.4 * other)
    # Ignored pixels count 0, so that equal parts of a batch have it as their mean.
    target[0, :5] = 255
    whole = segmentation_loss(Segmentation(logits, None), target)
    known = (target != 255).float().mean()
    torch.testing.assert_close(whole, F.cross_entropy(logits, target, ignore_index=255) * known)
    parts = [segmentation_loss(Segmentation(logits[i : i + 1], None), target[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(whole, sum(parts) / 2)
    target[target == 255] = 7
    torch.testing.assert_close(segmentation_loss(Segmentation(logits, None), target, ignore_index=7), whole)
    with pytest.raises(ValueError, match=r"target: expected the shape \[2, 6, 7\], got \[2, 7, 6\]"):
        segmentation_loss(outputs, target.mT)


def test_a_batch_without_any_label_has_a_loss_of_zero():
    model = build("upernet").train()
    loss = segmentation_loss(model(torch.randn(2, 3, 32, 32)), torch.full((2, 32, 32), 255))
    assert loss == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_few_steps_learn_what_is_in_a_picture():
    torch.manual_seed(3)
    model = SegmentationModel(create_vit(DARL, dynamic_img_size=True), 2, "upernet", width=16, dropout=0.0)
    images = torch.randn(4, 3, 32, 32)
    target = torch.zeros(4, 32, 32, dtype=torch.long)
    target[:2, :, :16], target[2:, 16:] = 1, 1
    images += 2 * target[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        segmentation_loss(model(images), target).backward()
        optimizer.step()
    assert (model.eval()(images).logits.argmax(1) == target).float().mean() > 0.9


# Decorrelation.


@encoders
@heads
def test_the_sites_are_the_encoders(head, architecture):
    model = build(head, architecture)
    found = find_sites(model)
    expected = find_sites(create_vit(architecture))
    for site, layers in expected.items():
        assert list(found[site]) == [f"encoder.{name}" for name in layers], site
        assert layers
    # Heads have no layers that a filter alone would take.
    convert(model, sites=None, filter=lambda name, module: True)
    changed = [
        name for name, m in model.named_modules() if isinstance(m, dbpkern.layers.modules.Decorrelated)
    ]
    assert len(changed) == sum(map(len, expected.values()))
    assert all(name.startswith("encoder.") for name in changed)


@pytest.mark.parametrize(
    ("head", "architecture", "optimizer"),
    [
        ("upernet", MAE, torch.optim.AdamW),
        ("dpt", DARL, torch.optim.SGD),
        ("linear", DARL, torch.optim.AdamW),
    ],
)
def test_training_with_decorrelation_leaves_a_stock_model(head, architecture, optimizer):
    model = build(head, architecture)
    stock = build(head, architecture)
    start = segmenter_state_dict(model)
    convert(model, sites="all")
    decor = decor_sgd(model, eta=0.02, sample=1.0, seed=1)
    steps = optimizer(model.parameters(), 1e-3)
    images, target = torch.randn(4, 3, 40, 33), torch.randint(5, (4, 40, 33))
    for _ in range(4):
        steps.zero_grad()
        segmentation_loss(model(images), target).backward()
        steps.step()
        decor.step()
    assert all(
        (layer.dense_R() - torch.eye(len(layer.dense_R()))).abs().max() > 1e-4
        for layer in model.modules()
        if isinstance(layer, dbpkern.layers.modules.Decorrelated)
    )
    expected = model.eval()(images).logits
    dbpkern.fuse(model)
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)
    state = segmenter_state_dict(model)
    assert state.keys() == start.keys()
    stock.load_state_dict(state)
    assert torch.equal(stock.eval()(images).logits, model(images).logits)
    assert not torch.equal(
        state["encoder.blocks.0.attn.qkv.weight"], start["encoder.blocks.0.attn.qkv.weight"]
    )


def test_a_preconditioner_serves_the_encoder():
    model = build("upernet")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    decor = preconditioner(model, optimizer, sites="all", eta=0.02, every=1)
    expected = {m for found in find_sites(model.encoder).values() for m in found.values()}
    assert {m for m in model.modules() if stock_layer(m)} == expected
    images, target = torch.randn(2, 3, 32, 32), torch.randint(5, (2, 32, 32))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = segmentation_loss(model(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    decor.remove()
    assert model.state_dict().keys() == build("upernet").state_dict().keys()
