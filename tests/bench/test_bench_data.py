"""The benchmark of the loader: what it makes, checks, measures and writes."""

import json
import tarfile

import pytest
import torch
from PIL import Image

from bench import data as bench
from bench.__main__ import main
from train.data import augment, pretraining

TINY = ["--images", "12", "--batch", "4", "--batches", "1", "--rounds", "2", "--img-size", "32"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_files_are_the_same_each_time_and_in_folder_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PER_SHARD", 4)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(len(contents))
        folder, shards = bench.make_files(tmp_path / name, 6)
        contents.append({path.name: path.read_bytes() for path in folder.rglob("*.jpg")})
        packed = {}
        assert [path.name for path in sorted(shards.iterdir())] == ["000000.tar", "000001.tar"]
        for path in shards.iterdir():
            with tarfile.open(path) as tar:
                packed |= {member.name: tar.extractfile(member).read() for member in tar}
        assert packed == contents[-1]
    assert contents[0] == contents[1]
    assert len(set(contents[0].values())) == 6
    sizes = [Image.open(path).size for path in sorted(folder.rglob("*.jpg"), key=lambda path: path.name)]
    assert sizes == [(500, 400)] * 3 + [(400, 500)] + [(500, 400)] * 2


def test_every_source_place_and_number_of_workers_is_measured(tmp_path, cache, capsys):
    path = tmp_path / "data.json"
    assert main(["data", *TINY, "--workers", "0", "1", "--rate", "10000", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert written["command"].startswith("python -m bench data --images 12 ")
    assert {"machine", "date", "device", "precision"} <= set(written)
    (result,) = written["results"]
    assert result["files"] == 12
    assert 0.2 < min(result["differences"].values()) <= max(result["differences"].values()) < 1
    assert list(result["differences"]) == ["photos", "folder", "wds"]
    found = [(row["source"], row["augment_on"], row["workers"]) for row in result["loaders"]]
    sources, places = ("photos", "folder", "wds"), ("host", "device")
    assert found == [(source, place, n) for source in sources for place in places for n in (0, 1)]
    assert len(result["stages"]) == 7
    for row in result["loaders"] + result["stages"]:
        quartiles = row["images_per_second"]
        assert 0 < quartiles["low"] <= quartiles["median"] <= quartiles["high"]
        assert len(row["rounds"]) == 2
    for row in result["loaders"]:
        assert row["per_worker"] == row["images_per_second"]["median"]
        assert (row["workers_needed"] - 1) * row["per_worker"] < 10000
        assert row["workers_needed"] * row["per_worker"] >= 10000
    out = capsys.readouterr().out
    assert "| wds    | device       |       1 |" in out
    assert "Checked: first batches as by direct reading." in out
    assert not cache.exists()  # the index of files that are gone is not kept


def test_small_files_are_loaded_from_memory(tmp_path, cache, capsys, monkeypatch):
    decoded = []
    real = bench.build

    def build(*arguments):
        decoded.append(real(*arguments).images.decoded)
        return real(*arguments)

    monkeypatch.setattr(bench, "build", build)
    arguments = ["--side", "32", "--cache", "1", "--augment", "host", "--workers", "0"]
    assert main(["data", *TINY, *arguments]) == 0
    photos, folder, wds = decoded
    assert photos is None
    for found in (folder, wds):
        assert found.places[:, 1:].unique().tolist() == [32]
    assert ", cache of 1 MiB" in capsys.readouterr().out


def test_a_loader_that_gives_something_else_is_found(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        bench.Loader, "start", lambda loader: [pretraining.collate([loader.dataset[0, 0]] * 4)] * 2
    )
    path = tmp_path / "data.json"
    arguments = ["--sources", "photos", "--workers", "0", "--json", str(path)]
    assert main(["data", *TINY, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "photos on the host, 0 workers: the first batch is not that of direct reading" in captured.err
    assert not path.exists()


def test_a_device_that_shows_something_else_is_found(capsys, monkeypatch):
    real = augment.finish_batch
    monkeypatch.setattr(augment, "finish_batch", lambda *arguments: real(*arguments).roll(1, -1))
    assert main(["data", *TINY, "--sources", "photos", "--workers", "0"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "photos: device and host differ by" in captured.err


def test_batches_that_are_ready_are_not_timed(monkeypatch):
    given = []

    def seconds(step, device, inner):
        for _ in range(inner):
            step()
        return float(len(given))

    monkeypatch.setattr(bench.measure, "seconds", seconds)
    args = bench.argparse.Namespace(
        batch=4, batches=3, img_size=32, draft=False, cache=0, device=torch.device("cpu")
    )
    loader = bench.Loader("photos", "host", 2, bench.build("photos", "host", args), args)
    monkeypatch.setattr(loader, "start", lambda: (given.append(i) or i for i in range(100)))
    assert loader.seconds() == 1 + 2 * 2 + 3
    assert len(loader.sampler) == 8


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "-1"], "expected a number of at least 0, got -1"),
        (["--cache", "-1"], "expected a number of at least 0, got -1"),
        (["--sources", "imagenet"], "invalid choice: 'imagenet'"),
        (["--batch", "0"], "expected a positive number, got 0"),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["data", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
