"""Images for pre-training: samples, photographs, runs on them, options."""

import json
import random
import socket
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import (
    BLUE,
    GREEN,
    IMG_SIZE,
    NUM_PATCHES,
    RED,
    assert_same,
    build,
    color,
    encoded,
    write_shard,
)

from train import pretrain
from train.data import photos as photographs
from train.data.augment import Crop, View
from train.data.pretraining import DataConfig, HeldOutSet, TrainingSet
from train.data.reading import Images
from train.tasks.families import task_of

# Samples


def test_sample_is_a_function_of_seed_epoch_and_index(photos):
    first, _ = photos
    keys = [(0, 0), (0, 1), (5, 1), (5, 895)]
    expected = {key: first[key] for key in keys}
    other, _ = build()
    for state, key in enumerate(reversed(keys)):
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        assert_same(other[key], expected[key])
    assert expected[0, 0].image.shape == (3, *IMG_SIZE)
    assert expected[0, 0].image.dtype == torch.float32
    assert expected[0, 0].noise.shape == (NUM_PATCHES,)
    assert expected[0, 0].noise.dtype == torch.float32


def test_sample_differs_between_epochs_indices_and_seeds(photos):
    samples = [photos[0][0, 0], photos[0][1, 0], photos[0][0, 1], build(seed=1)[0][0, 0]]
    for i, a in enumerate(samples):
        for b in samples[:i]:
            assert not torch.equal(a.image, b.image)
            assert not torch.equal(a.noise, b.noise)


# Photographs


def test_photos_without_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    train, held_out = build()
    assert len(train) == 14 * 64
    assert len(held_out) == 256


def test_photos_split(photos):
    train, held_out = photos
    assert not set(train.files) & set(held_out.images.names)
    assert sorted(held_out.images.names) == ["chelsea.png", "coins.png", "gravel.png", "rocket.jpg"]
    assert len(train.files) == 14
    assert {"motorcycle_left.png", "motorcycle_right.png", "china.jpg", "flower.jpg"} < set(train.files)
    for dataset in photos:
        for i in range(len(dataset.images.names)):
            (image, _), skipped = dataset.images.read(i)
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
            assert min(image.shape[1:]) >= 300
            assert skipped == []


def test_an_epoch_of_photos_has_as_many_crops_of_each(photos, monkeypatch):
    train, _ = build(crops_per_photo=3)
    assert len(train) == 42
    read = []
    crop = Crop(torch.zeros(3, 8, 8).byte(), View(0, 0, 8, 8))
    monkeypatch.setattr(train.images, "read", lambda i, choose: read.append(i) or (crop, []))
    for index in range(42):
        _ = train[0, index]
    assert sorted(read) == sorted(list(range(14)) * 3)


def test_missing_photo_package(monkeypatch):
    monkeypatch.setattr(photographs, "PHOTOS", {"a_package_nobody_has/data": ("a.png",)})
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        build()


def test_held_out_set_is_fixed(photos):
    _, expected = photos
    _, other = build(seed=7, fraction=0.2, subset_seed=3, crop_scale=(0.5, 0.6), crops_per_photo=2)
    torch.manual_seed(9)
    assert len(other) == len(expected) == 256
    for index in (0, 1, 255):
        assert_same(other[index], expected[index])
    assert not torch.equal(expected[0].image, expected[4].image)  # two crops of one photograph
    assert not torch.equal(expected[0].noise, expected[4].noise)
    with pytest.raises(IndexError, match="256"):
        _ = expected[256]


def test_held_out_crops_are_spread_over_the_photos():
    solid = {"red": RED, "green": GREEN, "blue": BLUE}
    solid = {
        name: torch.tensor(c, dtype=torch.uint8).view(3, 1, 1).expand(3, 9, 9) for name, c in solid.items()
    }
    held_out = HeldOutSet(
        Images(list(solid), partial(photographs.cut, solid)), IMG_SIZE, NUM_PATCHES, crops=6
    )
    assert [color(sample.image) for sample in held_out] == [RED, GREEN, BLUE] * 2


# Runs

TINY = [
    "--model=mae_vit_tiny",
    "--model_args={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 1, decoder_embed_dim: 16,"
    " decoder_depth: 1, decoder_num_heads: 1}",
    "--img_size=16",
    "--batch_size=6",
    "--steps=4",
    "--optim.warmup_steps=1",
    "--eval_every=4",
    "--checkpoint_every=2",
    "--device=cpu",
]


def records(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def test_a_run_on_shards_resumes_exactly(sharded, tmp_path, capsys):
    source = [f"--data.source=wds:{sharded}/set-*.tar", "--data.shard_window=2", "--data.augment_on=device"]
    pretrain.main([*TINY, *source, f"--out={tmp_path / 'whole'}"])
    whole = records(tmp_path / "whole")
    half = tmp_path / "whole" / "checkpoints" / "step-00000002"
    memory = "--data.cache=1"  # changes no sample
    pretrain.main([*TINY, *source, memory, f"--resume={half}", f"--out={tmp_path / 'rest'}"])
    assert [r["loss"] for r in records(tmp_path / "rest")] == [r["loss"] for r in whole[2:]]
    # Other images than before would be another run.
    write_shard(sharded / "set-004.tar", [("0.png", encoded(RED))])
    with pytest.raises(SystemExit):
        pretrain.main([*TINY, *source, "--resume=auto", f"--out={tmp_path / 'rest'}"])
    assert "data: they are no longer those of" in capsys.readouterr().err
    (sharded / "set-004.tar").unlink()
    # The list that a run leaves gives the same run.
    listed = [*source, f"--data.files={tmp_path / 'whole' / 'files.txt'}"]
    pretrain.main([*TINY, *listed, f"--out={tmp_path / 'listed'}"])
    assert [r["loss"] for r in records(tmp_path / "listed")] == [r["loss"] for r in whole]


def test_the_log_tells_the_time_spent_waiting_for_data(tmp_path, monkeypatch):
    real = TrainingSet.__getitem__

    def slow(dataset, key):
        time.sleep(0.02)
        return real(dataset, key)

    monkeypatch.setattr(TrainingSet, "__getitem__", slow)
    pretrain.main([*TINY, "--steps=2", "--accumulation=2", f"--out={tmp_path / 'run'}"])
    first, second = records(tmp_path / "run")
    assert 6 * 0.02 <= first["data_seconds"] <= first["seconds"]
    assert 6 * 0.02 <= second["data_seconds"] <= second["seconds"] - first["seconds"]


TRAIN = Path(pretrain.__file__).parent
# Those of other scripts are named after them.
OTHERS = {script.stem for script in TRAIN.glob("*.py")} | {"linprobe"}
PRESETS = [p for p in sorted(TRAIN.glob("configs/*.yaml")) if p.stem.partition("_")[0] not in OTHERS]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.stem)
def test_presets_are_understood(preset):
    config = pretrain.parse([f"--config={preset}", "--out=runs/x"])
    task_of(config).check()
    if preset.stem in ("dbp_base", "mae_base"):
        assert (config.model, config.img_size) == ("mae_vit_base", 224)
        assert config.data.fraction == (0.1 if preset.stem == "dbp_base" else 1)
        assert config.decor.enable == (preset.stem == "dbp_base")
        assert config.mae.decoder == ("dbp" if preset.stem == "dbp_base" else "mae")


# Configuration


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "imagenet"}, "source must be 'photos', 'folder:PATH' or 'wds:PATTERN', not 'imagenet'"),
        ({"source": "folder:"}, "source must be"),
        ({"source": "photos:x"}, "source must be"),
        ({"source": "wds:"}, "source must be"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, not 0.0"),
        ({"fraction": 1.5}, "fraction must be"),
        ({"fraction": float("nan")}, "fraction must be .* not nan"),
        ({"subset_seed": -1}, "subset_seed must be"),
        ({"subset_seed": 2**63}, "subset_seed must be"),
        ({"workers": -1}, "workers must be at least 0, not -1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be"),
        ({"crop_scale": (0.5, 0.2)}, "crop_scale must be"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale must be"),
        ({"crop_scale": (0.5, float("nan"))}, "crop_scale must be"),
        ({"crop_scale": (0.5,)}, "crop_scale must be"),
        ({"crops_per_photo": 0}, "crops_per_photo must be at least 1, not 0"),
        ({"files": "list.txt", "fraction": 0.5}, "files and a fraction exclude each other, .* is 0.5"),
        ({"shard_window": -1}, "shard_window must be at least 0, not -1"),
        ({"augment_on": "gpu"}, "augment_on must be 'host' or 'device', not 'gpu'"),
        ({"draft": True}, "draft has no meaning for source 'photos'"),
        ({"cache": 1}, "cache has no meaning for source 'photos', which are decoded once"),
        (
            {"source": "folder:a", "cache": -1},
            "cache must be a number of MiB of at least 0, or 'auto', not -1",
        ),
        ({"source": "folder:a", "cache": "all"}, "cache must be .* not 'all'"),
        (
            {"source": "folder:a", "cache": "auto", "draft": True},
            "cache must be 0 beside draft, .* not 'auto'",
        ),
        ({"val": 0.1}, "val must be null for source 'photos', which has held-out images, not 0.1"),
        (
            {"source": "folder:a", "val": 0.0},
            "val must be a part above 0 and below 1, a path, or null, not 0.0",
        ),
        ({"source": "folder:a", "val": 1.0}, "val must be a part .* not 1.0"),
        ({"source": "folder:a", "val": float("nan")}, "val must be a part .* not nan"),
        ({"source": "folder:a", "val": ""}, "val must be a part .* not ''"),
    ],
)
def test_config_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**kwargs)
