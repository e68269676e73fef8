"""Segmentation models in use: sliding windows, several versions of an image, files, exported graphs."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from segmenters import CLASSES, DARL, MAE, SHALLOW, SIZES, build, encoders, heads

from models.classifier import create_vit, load_encoder
from models.segmentation import (
    Segmentation,
    load_segmenter,
    multiscale_logits,
    segmenter_metadata,
    segmenter_state_dict,
    sliding_logits,
)

# Sliding windows.


def test_one_window_is_the_whole_image():
    model = build("linear").eval()
    images = torch.randn(2, 3, 37, 50)
    for window in ((37, 50), (64, 64), (37, 99)):
        found = sliding_logits(model, images, window, stride=window)
        assert torch.equal(found, model(images).logits)
    assert not found.requires_grad


@pytest.mark.parametrize("size", [(37, 50), (16, 61), (40, 40), (5, 7), (17, 16)])
@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 11), ((24, 8), (7, 8)), (16, 1)])
def test_windows_are_averaged_over_every_pixel(size, window, stride):
    calls = []

    def spy(crops: torch.Tensor) -> Segmentation:
        """Logits that are the pixels themselves, and the same again with a value for each window."""
        calls.append(crops)
        mark = torch.full_like(crops[:, :1], 1.0)
        return Segmentation(torch.cat([crops, mark], dim=1), None)

    images = torch.randn(2, 3, *size)
    found = sliding_logits(spy, images, window, stride, batch=3)
    torch.testing.assert_close(found[:, :3], images, atol=1e-5, rtol=1e-5)
    assert (found[:, 3] == 1).all()
    (h, w), (dy, dx) = [x if isinstance(x, tuple) else (x, x) for x in (window, stride)]
    h, w = min(h, size[0]), min(w, size[1])
    rows = max(size[0] - h + dy - 1, 0) // dy + 1
    columns = max(size[1] - w + dx - 1, 0) // dx + 1
    assert sum(map(len, calls)) == 2 * rows * columns
    assert all(crops.shape[1:] == (3, h, w) for crops in calls)
    assert max(map(len, calls)) <= 6


def test_windows_that_overlap_weigh_the_same():
    def numbered(crops: torch.Tensor) -> Segmentation:
        numbered.count += 1
        return Segmentation(torch.full_like(crops[:, :2], float(numbered.count)), None)

    numbered.count = 0
    found = sliding_logits(numbered, torch.randn(1, 3, 4, 7), window=4, stride=2)
    # Windows begin at columns 0, 2 and 3, the last one moved back.
    assert found[0, 0, 0].tolist() == [1, 1, 1.5, 2, 2.5, 2.5, 3]


def test_the_number_of_windows_in_a_call_changes_nothing():
    model = build("upernet", DARL).eval()
    images = torch.randn(2, 3, 45, 70).transpose(2, 3)
    one = sliding_logits(model, images, 32, 20)
    assert one.shape == (2, 5, 70, 45)
    torch.testing.assert_close(sliding_logits(model, images, 32, 20, batch=4), one, atol=1e-5, rtol=1e-4)
    for options, message in (
        ({"stride": 33}, r"stride: expected at most the window's \(32, 32\), got \(33, 33\)"),
        ({"stride": 0}, "stride must be a positive number"),
        ({"window": 0}, "window must be a positive number"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            sliding_logits(model, images, **{"window": 32, "stride": 32} | options)


def test_versions_are_averaged_as_probabilities():
    def model(crops: torch.Tensor) -> Segmentation:
        return Segmentation(crops[:, :2] * 2, None)

    images, larger = torch.randn(2, 3, 6, 8), torch.randn(2, 3, 9, 12)
    one = multiscale_logits(model, [images], (6, 8), 6, 4)
    torch.testing.assert_close(one, 2 * images[:, :2])
    both = multiscale_logits(model, [images, images], (6, 8), 6, 4, flip=True)
    torch.testing.assert_close(both.softmax(1), one.softmax(1))
    mixed = multiscale_logits(model, [images, larger], (6, 8), 6, 4)
    other = multiscale_logits(model, [larger], (6, 8), 6, 4)
    torch.testing.assert_close(mixed.exp(), (one.softmax(1) + other.softmax(1)) / 2)


# Files.


@encoders
@heads
def test_a_model_is_read_again(head, architecture, tmp_path):
    options = {"blocks": (1, 1, 2, 2)} if head == "dpt" else {}
    model = build(head, architecture, img_size=(40, 64), **options)
    model.train()(torch.randn(2, 3, 32, 32))
    path = tmp_path / "segmenter.safetensors"
    state = segmenter_state_dict(model)
    save_file(state, path, metadata=segmenter_metadata(model, architecture, CLASSES))
    loaded = load_segmenter(path)
    assert loaded.architecture == replace(architecture, sizes=SIZES)
    assert loaded.classes == tuple(CLASSES)
    assert loaded.model.encoder.patch_embed.img_size == (40, 64)
    assert loaded.model.blocks == model.blocks
    found = loaded.model.state_dict()
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    images = torch.randn(2, 3, 33, 50)
    assert torch.equal(loaded.model.eval()(images).logits, model.eval()(images).logits)
    # What is written is a copy.
    assert not {t.data_ptr() for t in state.values()} & {t.data_ptr() for t in model.state_dict().values()}


def test_files_that_cannot_be_read_say_why(tmp_path):
    model = build("linear")
    path = tmp_path / "segmenter.safetensors"
    weights, about = segmenter_state_dict(model), segmenter_metadata(model, MAE, CLASSES)
    with pytest.raises(ValueError, match="classes: expected 5 names, got 2"):
        segmenter_metadata(model, MAE, ["a", "b"])
    for path_of, message in ((path, "no such segmentation model: "), (tmp_path, "a folder, expected a file")):
        with pytest.raises(FileNotFoundError, match=message):
            load_segmenter(path_of)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"segmenter.safetensors cannot be read"):
        load_segmenter(path)
    for change, message in (
        ({"classes": '["a", "b"]'}, "expected weights for the 2 classes named, got 5"),
        ({"classes": "a, b"}, "Expecting value"),
        ({"head": "upernet"}, "blocks: expected 4 of 0 to 3"),
        ({"head": "nonsense"}, "head: expected one of"),
        ({"blocks": "("}, "never closed"),
        ({"blocks": "3"}, "has no len"),
        ({"model": "resnet"}, "unknown model 'resnet'"),
        ({"embed_dim": "16"}, r"does not fit the model: .*expected .*got"),
        ({"depth": "5", "blocks": "(4,)"}, r"does not fit the model: encoder.blocks.4.*missing"),
        ({"head": None}, "expected a segmenter.safetensors, whose metadata has .*; head missing"),
    ):
        changed = {name: text for name, text in (about | change).items() if text is not None}
        save_file(weights, path, metadata=changed)
        with pytest.raises(ValueError, match=message) as caught:
            load_segmenter(path)
        assert str(path) in str(caught.value)
    vit = create_vit(MAE)
    save_file(vit.state_dict(), path, metadata=MAE.metadata())
    with pytest.raises(ValueError, match=r"expected a segmenter.safetensors.*head, blocks.* missing"):
        load_segmenter(path)
    save_file(weights, path, metadata=about)
    with pytest.raises(ValueError, match=r"does not fit the model: cls_token \(missing\)"):
        load_encoder(path)


# Export.


@pytest.mark.parametrize(
    ("head", "architecture"),
    [
        ("linear", MAE),
        ("linear", replace(DARL, positions="rope1d")),
        ("upernet", MAE),
        ("upernet", DARL),
        ("dpt", replace(DARL, positions="none")),
    ],
)
def test_exported_graphs_take_any_multiple(head, architecture):
    model = build(head, replace(architecture, sizes=SHALLOW.sizes)).eval()
    rows, columns = model.multiple
    least = 1 if head == "linear" else 2  # maps of one row or column are a case of their own to the exporter
    dynamic = {
        0: torch.export.Dim("batch"),
        2: rows * torch.export.Dim("rows", min=least, max=64),
        3: columns * torch.export.Dim("columns", min=least, max=64),
    }
    exported = torch.export.export(
        model, (torch.randn(2, 3, 3 * rows, 2 * columns),), dynamic_shapes=(dynamic,)
    ).module()
    for batch, height, width in ((2, 3, 2), (1, 2, 5), (3, 4, 4)):
        images = torch.randn(batch, 3, height * rows, width * columns)
        expected, found = model(images), exported(images)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-4)
        assert found.auxiliary is None
