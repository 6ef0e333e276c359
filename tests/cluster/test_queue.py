"""Which call a worker gets: it keeps its size, sizes are shared out, and nothing waits for a worker that is gone."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from flexclear.cluster.queue import Call, Queue


def calls(**counts):
    return [Call(f"{key}{number}", key, 1, None) for key, count in counts.items() for number in range(count)]


def test_a_worker_stays_with_its_size_and_two_begin_with_the_largest():
    queue = Queue(calls(a=2, b=5, c=4))
    taken = {worker: [queue.take(worker).key] for worker in "xy"}
    assert taken == {"x": ["b"], "y": ["c"]}
    for worker, count in (("x", 4), ("y", 3)):
        for _ in range(count):
            queue.finished(worker)
            taken[worker].append(queue.take(worker).key)
    assert taken == {"x": ["b"] * 5, "y": ["c"] * 4}
    queue.finished("x")
    assert queue.take("x").key == "a"


def test_work_counts_by_cost():
    queue = Queue([*calls(small=3), Call("large", "large", 16, None)])
    assert queue.take("x").name == "large"


def test_all_workers_begin_at_once_with_one_size():
    queue = Queue(calls(a=4))
    assert len({queue.take(worker).name for worker in "wxyz"}) == 4


def test_nobody_begins_a_size_that_others_are_about_to_finish():
    queue = Queue(calls(a=4))
    queue.take("x")
    queue.finished("x")
    queue.take("x")
    assert queue.take("y") is not None, "two wait, and one is there"
    queue.finished("x")
    queue.take("x")
    assert queue.unfinished == 2
    queue = Queue(calls(a=3))
    queue.take("x")
    queue.finished("x")
    queue.take("x")
    assert queue.take("y") is None, "the one that waits is the next of one who has compiled"


def test_who_has_drawn_a_size_before_helps_at_once():
    queue = Queue(calls(a=1, b=3))
    assert [queue.take("x").key, queue.take("y").key] == ["b", "a"]
    queue.finished("x")
    queue.take("x")
    queue.finished("y")
    assert queue.take("y") is None
    queue = Queue(calls(b=4))
    assert [queue.take("x").key, queue.take("y").key] == ["b", "b"]
    queue.finished("x"), queue.finished("y")
    queue.take("x")
    assert queue.take("y").key == "b"


def test_a_lost_call_is_the_next_one_and_its_worker_is_forgotten():
    queue = Queue(calls(a=3))
    first = queue.take("x")
    assert queue.lost("x") == first
    assert queue.lost("z") is None
    assert queue.take("y") == first
    assert queue.unfinished == 3


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_every_call_is_finished_once(seed):
    chance = random.Random(seed)
    queue = Queue(calls(a=chance.randrange(1, 9), b=chance.randrange(9), c=chance.randrange(9)))
    total, done, busy = queue.unfinished, Counter(), {}
    names = iter(range(10**6))
    workers = [next(names) for _ in range(chance.randrange(1, 5))]
    while queue.unfinished:
        for worker in workers:
            if worker not in busy and (call := queue.take(worker)) is not None:
                busy[worker] = call
        assert busy, "nobody has a call, and some are unfinished"
        worker = chance.choice(list(busy))
        call = busy.pop(worker)
        if chance.random() < 0.3:
            assert queue.lost(worker) == call
            workers[workers.index(worker)] = next(names)
        else:
            assert queue.finished(worker) == call
            done[call.name] += 1
    assert set(done.values()) == {1}
    assert len(done) == total
