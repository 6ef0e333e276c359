"""The helper that runs tasks in several processes: a late answer is never that of a later task."""

from __future__ import annotations

import pytest

from helpers.parallel_group import Group


@pytest.fixture
def two():
    group = Group(2)
    yield group
    group.close()


def test_a_late_answer_is_not_taken_for_that_of_the_next_task(two, tmp_path):
    assert two.results("answer", "first") == ["first", "first"]
    with pytest.raises(TimeoutError, match="rank 0 of 2 did not finish answer"):
        two.run("answer", "late", until=str(tmp_path / "now"), timeout=0.1)
    (tmp_path / "now").touch()
    assert two.results("answer", "next") == ["next", "next"]
    assert two.results("awake") == [0, 1]


def test_a_process_that_dies_is_named_and_the_next_task_gets_new_ones(two):
    with pytest.raises(ChildProcessError, match=r"rank 0 of 2 ended in trouble\('dies',\), exit status 1"):
        two.run("trouble", "dies")
    assert two.results("answer", "next") == ["next", "next"]
