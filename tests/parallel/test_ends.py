"""Runs that one rank ends before their time: the others get the cause, and the next run starts in step."""

from __future__ import annotations

import pytest

from helpers.parallel_group import Group

EXACT = 1e-5


@pytest.fixture(scope="module")
def two():
    group = Group(2)
    yield group
    group.close()


@pytest.fixture(scope="module")
def three():
    group = Group(3)
    yield group
    group.close()


def assert_drawn(outcomes):
    for kind, value in outcomes:
        assert kind == "drawn", value
        assert value <= EXACT


OWN = {"interrupt": ("KeyboardInterrupt", ""), "raise": ("Planted", "on purpose")}
REASON = {"interrupt": "KeyboardInterrupt", "raise": "Planted: on purpose"}


def assert_told(found, rank, what, told):
    """Of the first image; the next ones are drawn by all ranks, and each is what one process draws."""
    for other, result in enumerate(found):
        first, *rest = result["found"]
        if other != rank:
            assert first[0] == "ParallelError", first
            assert told in first[1]
        elif what in OWN:
            assert first == OWN[what]
        assert_drawn(rest)
        assert result["left"] == []


@pytest.mark.parametrize(
    ("where", "what", "rank", "tiles"),
    [
        ("step 2", "interrupt", 1, False),
        ("step 2", "raise", 0, False),
        ("after step 2", "interrupt", 0, False),
        ("after step 2", "raise", 1, False),
        ("after the last step", "raise", 0, True),
        ("decoding", "interrupt", 1, True),
    ],
)
def test_a_rank_that_stops_tells_the_others_why_and_the_next_run_starts_in_step(two, where, what, rank, tiles):
    place = f"the pipeline's loop {where.replace('the last', '')}" if where.startswith("after") else where
    place = place.replace("after  step", "after step 3")
    found = two.results("ended", where, what, rank, tiles)
    assert_told(found, rank, what, f"rank {rank} stopped in {place}: {REASON[what]}")


@pytest.mark.kept
def test_three_ranks_are_told_by_the_one_that_stops(three):
    for where, what, rank in (("step 2", "interrupt", 1), ("after step 2", "raise", 2)):
        place = where if what == "interrupt" else f"the pipeline's loop {where}"
        found = three.results("ended", where, what, rank)
        assert_told(found, rank, what, f"rank {rank} stopped in {place}: {REASON[what]}")


@pytest.mark.parametrize("tiles", [False, True])
def test_a_rank_whose_run_ends_early_is_named(two, tiles):
    found = two.results("ended", "after step 2", "ends early", 1, tiles)
    if tiles:
        kind, message = found[1]["found"][0]
        assert kind == "ParallelError"
        assert "rank 0 stopped in step 3" in message
    assert_told(found, 1, "ends early", "rank 1 had ended this run after step 2")


def test_a_run_that_ends_early_on_all_ranks_is_no_error(two):
    for result in two.results("ended", "after step 2", "ends early", None, True):
        first, *rest = result["found"]
        assert first[0] == "drawn"
        assert first[1] > EXACT
        assert_drawn(rest)


def test_fewer_steps_on_one_rank_are_named_before_the_first(two):
    for result in two.results("ended", "fewer steps", "", 1):
        first, *rest = result["found"]
        assert first[0] == "AgreedError"
        assert "step 1: rank 1 differs from rank 0 in the number of denoising steps: 2 against 3" in first[1]
        assert_drawn(rest)


def test_a_rank_that_is_late_in_a_step_is_named_and_told(two):
    (waited, *rest), (late, *others) = two.results("late_in_step_2", 1)
    assert waited[0] == late[0] == "ParallelError"
    assert "rank 0, step 2: rank 1 did not answer within 1 s" in waited[1]
    assert "rank 1, step 2: rank 0 in step 2 stopped waiting: this rank was late" in late[1]
    assert_drawn([*rest, *others])


def test_a_rank_that_is_late_at_the_first_call_is_named_and_told(three):
    found = three.results("late_at_the_first_call", 1)
    for rank, (first, *rest) in enumerate(found):
        assert first[0] == "ParallelError"
        told = "" if rank == 0 else "rank 0 stopped in step 1: "
        assert f"rank {rank}, step 1: {told}rank 1 did not answer within 1 s" in first[1]
        assert_drawn(rest)


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_waits_hears_a_signal_from_outside(two, first):
    (interrupted, *rest), (told, *others) = two.results("interrupted_while_it_waits", first)
    assert interrupted == ("KeyboardInterrupt", "")
    assert told[0] == "ParallelError"
    assert "rank 0 stopped in" in told[1]
    assert told[1].endswith(": KeyboardInterrupt")
    assert_drawn([*rest, *others])


def test_an_interrupt_in_a_call_without_a_pipeline_is_told(two):
    for rank, (first, second, third, twin, loaded) in enumerate(two.results("bare_model", 0)):
        assert_drawn([first, third, loaded])
        assert twin[0] == "drawn"
        assert twin[1] > 1e-2, "a deep copy calls itself"
        if rank == 0:
            assert second == ("KeyboardInterrupt", "")
        else:
            assert second == ("ParallelError", "rank 1, call 2: rank 0 stopped in call 2: KeyboardInterrupt")


def test_a_loop_of_one_s_own_that_ends_unseen_is_told_at_the_next_run(two):
    stayed, left = two.results("loop_without_a_pipeline", 1)
    assert_drawn(left)
    assert len(left) == 5
    assert_drawn([*stayed[:2], *stayed[3:]])
    assert len(stayed) == 6
    kind, message = stayed[2]
    assert kind == "ParallelError"
    assert "rank 0, step 3: rank 1 had ended this run after step 2, and had begun another one" in message


def test_survivors_say_that_the_holder_of_the_store_is_gone(three):
    for rank, answer in enumerate(three.run("rank_dies", 0, gone=(0,))):
        if rank:
            kind, outcomes = answer
            assert kind == "result", outcomes
            for name, message in outcomes:
                assert name == "StoreGoneError"
                assert message.startswith(f"rank {rank}, ")
                assert "rank 0, which holds it, is gone or halted" in message
                assert "did not answer" not in message


def test_a_rank_that_dies_is_named_also_when_the_store_has_gone_with_another(three):
    # Rank 0, which holds the store, waits less long for reasons than rank 2 does, and leaves.
    for rank, answer in enumerate(three.run("rank_dies", 1, gone=(1,), waits=(0.5, 0.5, 60.0))):
        if rank != 1:
            assert answer[0] == "result"
            [(kind, message)] = answer[1]
            assert kind == "ParallelError"
            assert (
                message
                == f"rank {rank}, step 2: rank 1 closed the connection without a reason: gone. A run needs all ranks"
            )


def test_a_store_that_no_longer_answers_does_not_hang_the_others(two):
    _, (kind, outcomes) = two.run("holder_of_the_store_is_halted", gone=(0,))
    assert kind == "result"
    assert [name for name, _ in outcomes] == ["StoreGoneError"]
    assert "rank 0, which holds it, is gone or halted" in outcomes[0][1]
