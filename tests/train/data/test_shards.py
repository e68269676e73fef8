"""Images in shards: found, indexed, read, damaged, held out."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import RED, assert_same, build, color, encoded, write_shard
from PIL import Image

from train.data import shards
from train.data.loading import StepSampler, build_loader
from train.data.pretraining import collate


def test_shards_give_their_images(sharded):
    train, held_out = build(f"wds:{sharded}/set-{{000..003}}.tar")
    names = sorted(train.files + held_out.images.names)
    assert names == [
        f"set-{shard:03}.tar/{name}"
        for shard in range(4)
        for name in (*(f"{i}.png" for i in range(5)), "sub/zero.JPG")
    ]
    assert sum(train.shards) == len(train) == 23
    assert len(train.shards) == 4
    for index, name in enumerate(train.files):
        sample = train[0, index]
        if name == "set-002.tar/sub/zero.JPG":
            ((skipped, reason),) = sample.skipped
            assert skipped == name
            assert "cannot identify image file" in reason
        elif name.endswith("png"):
            assert color(sample.image) == (10 * int(name[6]), 50 * int(name[12]), 0)
            assert sample.skipped == []


def test_shards_equal_the_same_images_in_a_folder(sharded, tmp_path):
    for shard in range(4):
        with tarfile.open(sharded / f"set-{shard:03}.tar") as tar:
            tar.extractall(tmp_path / "folder" / f"set-{shard:03}.tar", filter="data")
    (tmp_path / "shards").mkdir()
    for path in sharded.glob("*.tar"):
        path.rename(tmp_path / "shards" / path.name)
    pairs = zip(build(f"folder:{tmp_path / 'folder'}"), build(f"wds:{tmp_path / 'shards'}"), strict=True)
    (folder, shard), held_out = pairs
    assert folder.files == shard.files
    for index in range(len(folder)):
        assert torch.equal(folder[2, index].image, shard[2, index].image)
    assert torch.equal(held_out[0][0].image, held_out[1][0].image)


@pytest.mark.parametrize(
    "pattern", ["set-{000..003}.tar", "set-*.tar", "", "{set-00[01],set-*}.tar", "set-00{0..1}.tar*"]
)
def test_patterns(sharded, pattern):
    paths = [f"set-{shard:03}.tar" for shard in range(2 if pattern.endswith("*") else 4)]
    assert [path.name for path in shards.find_shards(f"{sharded}/{pattern}")] == paths


def test_shards_in_folders_are_named_from_what_they_share(tmp_path):
    for name in ("a/x.tar", "b/x.tar"):
        write_shard(tmp_path / name, [("0.png", encoded(RED)), ("1.png", encoded(RED))])
    assert shards.Shards(shards.find_shards(str(tmp_path)), (".png",)).names() == [
        "a/x.tar/0.png", "a/x.tar/1.png", "b/x.tar/0.png", "b/x.tar/1.png",
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_sharded_batches_are_those_of_direct_reading(sharded, workers):
    train, _ = build(f"wds:{sharded}")
    sampler = StepSampler(len(train), 6, 0, total_steps=5, shards=train.shards, window=2)
    _ = train[0, 0]  # leaves a file open, which the loaders must not use
    for keys, batch in zip(sampler, build_loader(train, sampler, workers, False, collate), strict=True):
        assert torch.equal(batch["image"], torch.stack([train[key].image for key in keys]))
    again = pickle.loads(pickle.dumps(train))
    assert_same(again[1, 3], train[1, 3])


def test_a_bounded_number_of_shards_is_open(sharded, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 2)

    def count():
        links = (Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd"))
        return sum(link.exists() and link.resolve().suffix == ".tar" for link in links)

    store = shards.Shards(shards.find_shards(str(sharded)), (".png",))
    assert count() == 0
    for name in store.names() * 2:
        assert Image.open(io.BytesIO(store.read(name))).size == (40, 30)
        assert 1 <= count() <= 2
    child = os.fork()
    if child == 0:
        opened, real = [], Path.open
        monkeypatch.setattr(Path, "open", lambda path, *a, **k: opened.append(path) or real(path, *a, **k))
        store.read(store.names()[-1])
        os._exit(len(opened))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_index_is_kept_and_renewed_when_a_shard_changes(sharded, cache, monkeypatch):
    path = sharded / "set-000.tar"
    real, calls = shards.read_members, []
    monkeypatch.setattr(shards, "read_members", lambda *args: calls.append(1) or real(*args))
    before = set(sharded.iterdir())
    first = shards.load_members(path, (".png",))
    second = shards.load_members(path, (".png",))
    assert len(calls) == 1
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(shards.load_members(path, (".png", ".jpg")).names) == 6
    assert len(calls) == 2
    write_shard(path, [("new.png", encoded(RED))])
    assert shards.load_members(path, (".png",)).names.tolist() == [b"new.png"]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert shards.load_members(path, (".png",)).names.tolist() == [b"new.png"]
    assert len(calls) == 4
    assert set(sharded.iterdir()) == before
    assert {file.suffix for file in cache.iterdir()} == {".npz"}


def test_shards_without_a_place_for_their_index(sharded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(build(f"wds:{sharded}/set-*.tar")[0]) == 23


def cut_at(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def garbage(path):
    content = bytearray(path.read_bytes())
    content[1024:1536] = b"?" * 512  # the second header
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_at(1024), "is truncated or damaged: no member and no end at byte 1024"),
        (cut_at(1300), "or is damaged: truncated header|no member and no end at byte 1024"),
        (cut_at(600), "or is damaged: unexpected end of data"),
        (cut_at(0), "or is damaged: empty file"),
        (garbage, "no member and no end at byte 1024"),
        (lambda path: path.write_text("no tar" * 1000), "cannot be read as a tar file"),
        (lambda path: write_shard(path, [("a.png", b"1"), ("a.png", b"2")]), "holds a.png twice"),
    ],
)
def test_damaged_shards_are_refused_by_name(sharded, damage, message):
    content = encoded(RED)
    assert len(content) < 512
    path = sharded / "set-001.tar"
    write_shard(path, [("a.png", content), ("b.png", content)])
    damage(path)
    with pytest.raises(ValueError, match=f"shard {path} .*({message})"):
        build(f"wds:{sharded}")


def test_shards_that_are_missing_or_hold_no_image(sharded, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*set-004\.tar \(and 1 more of 6\)"):
        build(f"wds:{sharded}/set-{{000..005}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*other-\*\.tar$"):
        build(f"wds:{sharded}/other-*.tar")
    with pytest.raises(ValueError, match=r"must be files on this machine .* not 'https://x/a\.tar'"):
        build("wds:https://x/a.tar")
    with pytest.raises(ValueError, match="Unbalanced"):
        build(f"wds:{sharded}/set-{{000..003.tar")
    write_shard(tmp_path / "labels" / "0.tar", [("a.cls", b"1")])
    with pytest.raises(FileNotFoundError, match=r"no image \(\.jpg .*\) in 1 shards below .*labels"):
        build(f"wds:{tmp_path}/labels")


def test_a_shard_that_vanishes_or_shrinks_later_is_skipped(sharded):
    train = pickle.loads(pickle.dumps(build(f"wds:{sharded}")[0]))  # with no file open
    (sharded / "set-000.tar").unlink()
    cut_at(100)(sharded / "set-001.tar")
    skipped = {}
    for index in range(len(train)):
        skipped |= dict(train[0, index].skipped)
    lost = [name for name in train.files if name < "set-002.tar"]
    assert set(skipped) == {*lost, "set-002.tar/sub/zero.JPG"}
    assert "FileNotFoundError" in skipped[lost[0]]
    assert "ends within" in skipped[lost[-1]]


def test_shards_can_be_held_out(sharded):
    train, held_out = build(f"wds:{sharded}/set-00{{0,1}}.tar", val=f"{sharded}/set-003.tar")
    assert (len(train), train.shards, len(held_out)) == (12, [6, 6], 6)
    assert color(held_out[1].image) == (30, 50, 0)
    part, rest = build(f"wds:{sharded}", val=0.5)
    assert (len(part), len(rest)) == (12, 12)
    with pytest.raises(ValueError, match="val must have no image in common with source wds:"):
        build(f"wds:{sharded}/set-00*.tar", val=f"{sharded}/set-003.tar")
    with pytest.raises(FileNotFoundError, match=r"no such shard: .*set-009\.tar"):
        build(f"wds:{sharded}/set-00{{0,1}}.tar", val=f"{sharded}/set-009.tar")
