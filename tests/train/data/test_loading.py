"""The order of samples, and the processes that load them."""

import os
import pickle
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from image_files import IMG_SIZE, assert_same, build

from train.data import pretraining
from train.data.loading import StepSampler, build_loader
from train.data.pretraining import TrainingSet, collate

# Processes


def test_random_numbers_of_the_caller_are_untouched(photos, monkeypatch):
    def fail(seed):
        raise AssertionError("the GPUs were seeded")

    state = torch.get_rng_state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "manual_seed_all", fail)
        _ = photos[0][0, 0]
        _ = photos[1][0]
    for workers in (0, 2):
        sampler = StepSampler(len(photos[0]), 2, seed=0, total_steps=2)
        list(build_loader(photos[0], sampler, workers, False, collate))
    assert torch.equal(torch.get_rng_state(), state)


def test_loader_gives_the_same_batches_with_workers(photos):
    for dataset, sampler in [
        (photos[0], StepSampler(len(photos[0]), 6, seed=0, total_steps=3, accumulation=2)),
        (photos[1], [[0, 1, 2], [3, 255]]),
    ]:
        alone = list(build_loader(dataset, sampler, 0, False, collate))
        pooled = list(build_loader(dataset, sampler, 2, False, collate))
        keys = list(sampler)
        assert len(alone) == len(pooled) == len(keys)
        for a, b, batch in zip(alone, pooled, keys, strict=True):
            assert a["image"].shape == (len(batch), 3, *IMG_SIZE)
            assert torch.equal(a["image"], torch.stack([dataset[key].image for key in batch]))
            assert torch.equal(a["noise"], torch.stack([dataset[key].noise for key in batch]))
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["noise"], b["noise"])
            assert a["skipped"] == b["skipped"] == []


LEAVE = """\
import os, signal, subprocess, sys, time

from torch.utils.data import Dataset

from train.data.loading import build_loader

class Odd(Dataset):
    def __getitem__(self, index):
        if index == 3 and sys.argv[1] == "raise":
            raise ValueError("odd")
        return index

batches = iter(build_loader(Odd(), [[index] for index in range(20)], 2, False, list))
print([next(batches), next(batches)])  # of either worker
if sys.argv[1] == "group":
    signal.signal(signal.SIGTERM, lambda *_: None)
    # By another process, as torchrun's or a terminal's: the workers heed their parent.
    subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)
    time.sleep(0.5)
print([*batches] if sys.argv[1] != "exit" else "")
"""


@pytest.mark.parametrize(("how", "code"), [("raise", 1), ("exit", 0), ("group", 0)])
def test_processes_with_loaders_end(tmp_path, how, code):
    # A real process: what hung was Python's exit, in which multiprocessing ends the workers.
    script = tmp_path / "leave.py"
    script.write_text(LEAVE)
    done = subprocess.run(
        [sys.executable, str(script), how],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
    )
    assert done.returncode == code, done.stderr
    assert ("ValueError: odd" in done.stderr) == (how == "raise")
    assert "killed" not in done.stderr
    if how == "group":  # a signal to all processes leaves the workers at work
        assert done.stdout.splitlines()[1] == str([[index] for index in range(2, 20)])


def test_loader_processes_use_one_thread():
    class Threads(TrainingSet):
        def __init__(self):
            pass

        def __getitem__(self, key):
            return pretraining.Sample(torch.tensor(torch.get_num_threads()), torch.zeros(1), [])

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (batch,) = build_loader(Threads(), [[0]], 1, False, collate)
    finally:
        torch.set_num_threads(before)
    assert batch["image"].tolist() == [1]


def test_datasets_can_be_sent_to_processes_that_are_not_forked(photos, broken_folder):
    folder = build(f"folder:{broken_folder}")
    for dataset, key in [(photos[0], (0, 5)), (photos[1], 5), (folder[0], (0, 0)), (folder[1], 0)]:
        assert_same(pickle.loads(pickle.dumps(dataset))[key], dataset[key])


# Order


@pytest.mark.parametrize("batch_size", [8, 24])  # of 10 samples: batches span two epochs and more
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_and_micro_batches_share_the_batch(world_size, accumulation, batch_size):
    expected = list(StepSampler(10, batch_size, seed=3, total_steps=5))
    ranks = [
        list(StepSampler(10, batch_size, 3, 5, 0, accumulation, rank, world_size))
        for rank in range(world_size)
    ]
    assert all(len(micro_batches) == 5 * accumulation for micro_batches in ranks)
    for step, batch in enumerate(expected):
        slices = [ranks[r][step * accumulation + m] for m in range(accumulation) for r in range(world_size)]
        assert len({len(part) for part in slices}) == 1
        assert list(chain(*slices)) == batch


def test_resumed_order_is_the_tail():
    arguments = {"num_samples": 7, "batch_size": 12, "seed": 0, "accumulation": 3, "rank": 1, "world_size": 2}
    complete = StepSampler(total_steps=6, **arguments)
    resumed = StepSampler(total_steps=6, start_step=4, **arguments)
    assert list(resumed) == list(complete)[4 * 3 :]
    assert list(complete) == list(complete)
    assert len(complete) == len(list(complete)) == 18
    assert len(resumed) == len(list(resumed)) == 6
    assert list(StepSampler(total_steps=6, start_step=6, **arguments)) == []


def test_every_epoch_has_each_sample_once():
    def epochs(seed):
        stream = list(chain(*StepSampler(50, 20, seed, total_steps=10)))
        assert [epoch for epoch, _ in stream] == [epoch for epoch in range(4) for _ in range(50)]
        return [[index for epoch, index in stream if epoch == e] for e in range(4)]

    orders = epochs(seed=0)
    assert all(sorted(order) == list(range(50)) for order in orders)
    orders += epochs(seed=1)
    assert len({tuple(order) for order in orders}) == 8


def test_order_leaves_the_random_numbers_of_the_caller_alone():
    state = torch.get_rng_state()
    expected = list(StepSampler(10, 5, 0, total_steps=4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert list(StepSampler(10, 5, 0, total_steps=4)) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 14, "world_size": 2, "accumulation": 2}, r"2 \* 2, not 14; the nearest: 12 or 16"),
        ({"batch_size": 3, "world_size": 2, "accumulation": 2}, r"not 3; the nearest: 4$"),
        ({"batch_size": 0}, r"not 0; the nearest: 1$"),
        ({"world_size": 11, "batch_size": 11}, "11 processes are more than the 10 training samples"),
        ({"accumulation": 0}, "accumulation must be at least 1, not 0"),
        ({"rank": 1}, "rank must be .* not 1 of 1"),
        ({"rank": -1}, "rank must be .* not -1 of 1"),
        ({"start_step": 3}, "start_step must be .* not 3 of 2"),
        ({"start_step": -1}, "start_step must be .* not -1 of 2"),
        ({"window": -1}, "window must be at least 0, not -1"),
        ({"shards": [4, 5]}, "shards must add up to the 10 samples, not to 9"),
    ],
)
def test_sampler_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(**{"num_samples": 10, "batch_size": 4, "seed": 0, "total_steps": 2} | kwargs)


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_shards_are_mixed_a_window_at_a_time(window):
    sizes = [5, 1, 7, 3, 4, 6, 2]
    shard_of = [shard for shard, size in enumerate(sizes) for _ in range(size)]
    sampler = StepSampler(28, 7, seed=0, total_steps=8, shards=sizes, window=window)
    indices = [index for _, index in chain(*sampler)]
    epochs = [indices[:28], indices[28:]]
    assert epochs[0] != epochs[1]
    groups = -(-7 // window)
    for epoch in epochs:
        assert sorted(epoch) == list(range(28))
        # As many groups as needed, of as many shards each, one after the other.
        group_sizes = [len(part) for part in torch.arange(7).tensor_split(groups)]
        first_seen = list(dict.fromkeys(shard_of[index] for index in epoch))
        for size in group_sizes:
            shards_of_group, first_seen = first_seen[:size], first_seen[size:]
            count = sum(sizes[shard] for shard in shards_of_group)
            assert {shard_of[index] for index in epoch[:count]} == set(shards_of_group)
            del epoch[:count]


def test_order_of_shards_is_shared_and_resumed():
    arguments = {"num_samples": 20, "batch_size": 8, "seed": 1, "shards": [6, 5, 9], "window": 2}
    whole = list(StepSampler(total_steps=7, **arguments))
    assert list(StepSampler(total_steps=7, start_step=4, **arguments)) == whole[4:]
    ranks = [list(StepSampler(total_steps=7, rank=r, world_size=2, **arguments)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    everywhere = StepSampler(20, 8, 1, total_steps=7, shards=[6, 5, 9], window=0)
    assert list(everywhere) == list(StepSampler(20, 8, 1, total_steps=7))
