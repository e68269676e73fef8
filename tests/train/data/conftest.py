"""Sources of images that several files of tests read."""

import pytest
from image_files import BLUE, BROKEN, build, encoded, save, write_shard


@pytest.fixture(scope="module")
def photos():
    return build()


@pytest.fixture
def broken_folder(tmp_path):
    for i in range(10):
        save(tmp_path / f"good{i}.png")
    for name, write in BROKEN.items():
        write(tmp_path / name)
    return tmp_path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "dbpkern" / "shards"


@pytest.fixture
def sharded(tmp_path):
    """Four shards of five images with labels, each image of another colour, and one that is broken."""
    for shard in range(4):
        members = []
        for i in range(5):
            content = encoded((10 * shard, 50 * i, 0))
            members += [(f"{i}.png", content), (f"{i}.cls", b"7")]
        members.append(("sub/zero.JPG", b"" if shard == 2 else encoded(BLUE, "JPEG")))
        write_shard(tmp_path / f"set-{shard:03}.tar", members)
    return tmp_path
