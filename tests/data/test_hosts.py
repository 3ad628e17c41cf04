"""The same global batches for any number of hosts, each a process of its own."""

import collections
import multiprocessing
import pathlib
import signal

import numpy as np
import pytest

from nextstep_jax.data.schema import KINDS
from tests.data import host
from tests.data.epochs import first_epoch

NUM_BATCHES = 6
CUT = 3
NUM_DOCUMENTS = 500


@pytest.fixture(scope="module")
def context():
    """Processes that share the imports and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.host"])
    return context


def start(context, count, *args, **changes):
    """Runs a host in each of `count` processes; returns their exit codes."""
    hosts = [
        context.Process(target=host.run, args=(index, count, *args), kwargs=changes)
        for index in range(count)
    ]
    for process in hosts:
        process.start()
    for process in hosts:
        process.join(240)
    return [process.exitcode for process in hosts]


def read(folder, step, count):
    """The global batch: the rows of the hosts in order."""
    parts = [
        dict(np.load(pathlib.Path(folder) / f"batch-{step}-{index}-of-{count}.npz"))
        for index in range(count)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(a, b):
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(context, tmp_path_factory):
    """One host, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(context, 1, 2, NUM_DOCUMENTS, folder, 0, NUM_BATCHES) == [0]
    return [read(folder, step, 1) for step in range(NUM_BATCHES)]


def test_one_two_and_four_hosts(context, whole, tmp_path):
    kinds = set()
    for count in (2, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        # Other numbers of threads, too.
        assert start(context, count, count - 2, NUM_DOCUMENTS, folder, 0, 3) == [0] * count
        for step in range(3):
            batch = read(folder, step, count)
            assert batch["token_ids"].shape == (8, 512)
            assert_equal(batch, whole[step])
            kinds |= {KINDS[k - 1] for k in np.unique(batch["kinds"]) if k}
            assert batch["pixels"].any()
    assert len(kinds) >= 3


def test_killed_on_four_hosts_and_continued_on_two(context, whole, tmp_path):
    killed = start(context, 4, 1, NUM_DOCUMENTS, tmp_path, 0, CUT + 1, kill=True)
    assert killed == [-signal.SIGKILL] * 4
    # The last state that all have written is the one before batch CUT.
    assert start(context, 2, 2, NUM_DOCUMENTS, tmp_path, CUT, NUM_BATCHES) == [0, 0]
    for step in range(CUT):
        assert_equal(read(tmp_path, step, 4), whole[step])
    for step in range(CUT, NUM_BATCHES):
        assert_equal(read(tmp_path, step, 2), whole[step])


def test_nothing_is_repeated_or_left_out_of_an_epoch(context):
    """Streams of two hosts, until all have left the first epoch and the packers are empty of it."""
    num_documents = 60
    for count in (1, 2):
        seen = collections.Counter()
        for index in range(count):
            iterator = host.make_iterator(index, count, 0, num_documents)
            seen.update(first_epoch(iterator, num_documents, host.NUM_STREAMS))
            iterator.close()
        # Every document of every kind, its first token once.
        assert set(seen.values()) == {1}
        assert len(seen) == len(KINDS) * num_documents
