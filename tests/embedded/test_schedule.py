"""The learning-rate schedule, whose end may be decided late."""

from __future__ import annotations

import pytest

from flexclear.embedded.train.schedule import Schedule, decide_end


def test_flat_until_the_end_is_decided():
    schedule = decide_end(warmup=10, done=0, total=None, decay_from=None)
    assert schedule.factor(0) == pytest.approx(0.1)
    assert schedule.factor(9) == schedule.factor(100_000) == 1
    assert not schedule.finished(100_000)


def test_decay_begins_where_the_run_stands():
    schedule = decide_end(warmup=10, done=900, total=1000, decay_from=None)
    assert schedule == Schedule(10, 900, 1000)
    assert schedule.factor(900) == 1
    assert schedule.factor(950) == pytest.approx(0.5)
    assert schedule.factor(999) == pytest.approx(0.01)
    assert schedule.finished(1000)


def test_default_decay_is_the_last_two_fifths():
    assert decide_end(warmup=10, done=0, total=1000, decay_from=None) == Schedule(10, 600, 1000)


def test_bad_ends_are_refused():
    with pytest.raises(ValueError, match="more than the 1000"):
        decide_end(warmup=10, done=1000, total=1000, decay_from=None)
    with pytest.raises(ValueError, match="before total"):
        Schedule(10, 1000, 1000)
    with pytest.raises(ValueError, match="together"):
        Schedule(10, None, 1000)
