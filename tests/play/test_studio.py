"""What the page draws, without the page: dense and windowed as the library draws them, one after the other, without a trace."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import flexclear
from flexclear.common.choices import EMBEDDED
from flexclear.common.shipped import model_directory
from flexclear.embedded.students import as_student, read_students
from flexclear.masks import Disc, Full, Layout, cost
from flexclear.play.looking import Grid
from flexclear.play.settings import PLAIN, PlaySettings, check_play, load_play
from flexclear.play.studio import Stopped, Studio, Wish
from flexclear.play.words import of_token, table
from flexclear.runtime.carrying import Hook
from flexclear.runtime.hooks import entry_hook_of

from helpers.parallel_pipelines import make_pipeline

WISH = Wish("a red apple on a blue background", 64, 96, 5, 2)
TEXT = 16


def studio_of(**options):
    fast = {"sizes": ((64, 64), (64, 96)), "text_len": TEXT, "backend": "sdpa", "device": "cpu", "steps": 2, **options}
    ready = check_play(PlaySettings(**fast))
    return Studio(ready, load_play(ready))


@pytest.fixture(scope="module")
def studio():
    return studio_of()


@pytest.fixture(scope="module")
def pipe():
    """The embedded pipeline by itself."""
    found = flexclear.embedded.pipeline()
    found.set_progress_bar_config(disable=True)
    return found


def pixels(image):
    return np.asarray(image.convert("RGB"))


def drawn(pipe, wish=WISH):
    """The same by the pipeline's own call."""
    return pixels(
        pipe(
            wish.prompt,
            height=wish.height,
            width=wish.width,
            num_inference_steps=wish.steps,
            max_sequence_length=TEXT,
            generator=torch.Generator().manual_seed(wish.seed),
        ).images[0]
    )


@pytest.fixture
def untouched(studio):
    """After the test the pipeline has its own weights and no window."""
    before = {name: value.clone() for name, value in studio.pipe.transformer.state_dict().items()}
    yield
    after = studio.pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not flexclear.is_transformed(studio.pipe)
    hooks = [hook for module in studio.pipe.transformer.modules() for hook in module._forward_pre_hooks.values()]
    assert not [hook for hook in hooks if isinstance(hook, Hook) or "note" in getattr(hook, "__name__", "")]


@pytest.mark.usefixtures("untouched")
def test_both_images_are_those_of_the_library(studio, pipe):
    dense = studio.dense(WISH)
    assert (pixels(dense.image) == drawn(pipe)).all()
    windowed = studio.windowed(WISH, dense, 3, PLAIN)
    with_window = drawn(flexclear.transform(pipe, r=3, backend="sdpa"))
    flexclear.restore(pipe)
    assert (pixels(windowed.drawn.image) == with_window).all()
    assert (with_window != drawn(pipe)).any()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("student", read_students(), ids=lambda student: student.path.stem)
def test_distilled_weights_draw_what_they_draw_elsewhere(studio, pipe, student):
    [choice] = [one for one in studio.weights if one.path == student.path]
    radius = min(student.radius, studio.largest_radius)  # as the page offers it: no image here is wider than r = 14
    windowed = studio.windowed(WISH, studio.dense(WISH), radius, choice)
    with as_student(pipe, student):
        flexclear.transform(pipe, r=radius, down_factor=student.down_factor, backend="sdpa")
        assert (pixels(windowed.drawn.image) == drawn(pipe)).all()
    assert (pixels(windowed.drawn.image) != drawn(pipe)).any()


@pytest.mark.usefixtures("untouched")
def test_weights_run_under_the_window_that_is_asked_for(studio, pipe):
    student = next(one for one in read_students() if one.radius == 4)
    [choice] = [one for one in studio.weights if one.path == student.path]
    windowed = studio.windowed(WISH, studio.dense(WISH), 2, choice)
    with as_student(pipe, student):
        flexclear.transform(pipe, r=2, backend="sdpa")
        assert (pixels(windowed.drawn.image) == drawn(pipe)).all()
    assert "trained for r = 4" in table(studio.dense(WISH), windowed)


def test_a_file_of_weights_is_offered_whether_or_not_it_says_its_window(tmp_path):
    from safetensors.torch import load_file, save_file

    student = next(one for one in read_students() if one.radius == 4)
    silent = tmp_path / "silent.safetensors"
    save_file(load_file(student.path), silent, {"format": "pt"})
    studio = studio_of(weights=(str(silent), "embedded:clear_local_8.safetensors"))
    assert [one.label for one in studio.weights[-2:]] == ["silent.safetensors", "clear_local_8.safetensors"]
    assert [one.radius for one in studio.weights[-2:]] == [None, 8]
    assert studio.first == (14, studio.weights[-2]), "the largest radius here"
    [stated] = [one for one in studio.weights if one.path == student.path]
    dense = studio.dense(WISH)
    images = [pixels(studio.windowed(WISH, dense, 4, one).drawn.image) for one in (studio.weights[-2], stated, PLAIN)]
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


@pytest.mark.usefixtures("untouched")
def test_work_is_that_of_the_call_that_was_made(studio):
    work = studio.windowed(WISH, studio.dense(WISH), 3, PLAIN).work
    assert work.layout.shape == (1, 8, 12)
    assert work.layout.text_len == TEXT
    spent = cost(Layout(8, 12, TEXT), Disc(3))
    assert work.allowed == pytest.approx(spent.density)
    assert (work.executed, work.masked) == (1.0, True)
    assert work.flops / work.dense_flops == pytest.approx(spent.density)


@pytest.mark.usefixtures("untouched")
def test_the_dense_image_is_kept_while_it_does_not_change(studio, monkeypatch):
    calls = []
    monkeypatch.setattr(studio, "_draw", lambda wish, on_step: calls.append(wish) or object(), raising=False)
    first = studio.dense(Wish("a", 64, 64, 0, 2))
    assert studio.dense(Wish("a", 64, 64, 0, 2)) is first
    for other in (Wish("b", 64, 64, 0, 2), Wish("b", 64, 96, 0, 2), Wish("b", 64, 96, 1, 2), Wish("b", 64, 96, 1, 3)):
        studio.dense(other)
    assert len(calls) == 5
    monkeypatch.setattr(studio, "_kept", None)


@pytest.mark.usefixtures("untouched")
def test_executed_work_is_that_of_the_blocks(studio):
    layout = Layout(32, 24, TEXT)
    with studio._with(3, PLAIN):
        work = studio._work(layout, False)
        size = entry_hook_of(studio.pipe.transformer).settings.kernel(
            "flex", torch.device("cpu"), torch.float32, layout.seq_len, backward=False
        )
    spent = cost(layout, Disc(3), block_size=size.block_size)
    assert work.executed == pytest.approx(spent.executed_pairs / spent.dense_pairs)
    assert work.allowed < work.executed < 1


def test_a_folder_of_another_model_is_drawn_from(tmp_path):
    make_pipeline("sd3").save_pretrained(tmp_path)
    studio = studio_of(model=str(tmp_path), sizes=(), text_len=None)
    assert all(height % studio.px == width % studio.px == 0 for height, width in studio.sizes)
    height, width = studio.sizes[2]
    wish = Wish("a red apple", height, width, 0, 2)
    windowed = studio.windowed(wish, studio.dense(wish), 2, PLAIN)
    layout = windowed.work.layout
    assert (layout.height * studio.px, layout.width * studio.px, layout.text_len) == (height, width, 333)
    assert Grid.of(windowed.drawn.image, layout) is not None
    assert (pixels(windowed.drawn.image) != pixels(studio.dense(wish).image)).any()


@pytest.mark.parametrize("model", [EMBEDDED, "owner/name"])
def test_a_radius_beyond_all_sizes_and_a_hub_id_of_the_cache(model, tmp_path, monkeypatch):
    if model != EMBEDDED:
        inside = tmp_path / "models--owner--name"
        (inside / "snapshots").mkdir(parents=True)
        (inside / "refs").mkdir()
        (inside / "refs" / "main").write_text("0" * 40)
        (inside / "snapshots" / ("0" * 40)).symlink_to(model_directory())
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert studio_of(model=model, r=14).first[0] == 14
    with pytest.raises(ValueError, match="--r 15 is more than the 14 tokens"):
        studio_of(model=model, r=15)


BAD = {
    "an empty prompt": (Wish(" ", 64, 64, 0, 2), 3, "write a prompt"),
    "no unicode": (Wish("\ud800", 64, 64, 0, 2), 3, "prompt"),
    "another size": (Wish("a", 64, 72, 0, 2), 3, "not among those offered: 64x64, 64x96"),
    "a seed": (Wish("a", 64, 64, -1, 2), 3, "the seed must be from 0"),
    "no steps": (Wish("a", 64, 64, 0, 0), 3, "1 or more steps"),
    "radius 0": (Wish("a", 64, 64, 0, 2), 0, "from 1 to 14 tokens, got 0"),
    "too large a radius": (Wish("a", 64, 64, 0, 2), 15, "from 1 to 14 tokens, got 15"),
}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", BAD)
def test_what_is_out_of_range_is_refused_before_anything_is_drawn(studio, name, monkeypatch):
    wish, radius, message = BAD[name]
    monkeypatch.setattr(type(studio.pipe), "__call__", lambda *a, **k: pytest.fail("it was drawn"))
    with pytest.raises(ValueError, match=message):
        studio.check(wish, radius)
    with pytest.raises(ValueError, match=message):
        studio.windowed(wish, None, radius, PLAIN)


@pytest.mark.usefixtures("untouched")
def test_the_largest_radius_sees_the_whole_image_and_the_next_smaller_one_does_not(studio):
    largest, layout = studio.largest_radius, Layout(8, 12, TEXT)
    assert cost(layout, Disc(largest)).pairs == cost(layout, Full()).pairs
    assert cost(layout, Disc(largest - 1)).pairs < cost(layout, Full()).pairs
    studio.windowed(WISH, studio.dense(WISH), largest, PLAIN)


@pytest.mark.usefixtures("untouched")
def test_an_error_in_a_step_leaves_the_pipeline_dense_and_the_next_one_is_drawn(studio):
    def fail(step, steps):
        raise MemoryError("no memory")

    choice = next(one for one in studio.weights if one.path is not None)
    dense = studio.dense(WISH)
    with pytest.raises(MemoryError, match="no memory"):
        studio.windowed(WISH, dense, 3, choice, fail)
    assert not flexclear.is_transformed(studio.pipe)
    assert studio.windowed(WISH, dense, 3, choice).drawn.counted == 1


@pytest.mark.usefixtures("untouched")
def test_threads_wait_for_each_other(studio):
    inside, most, here = 0, 0, threading.Barrier(3)

    def on_step(step, steps):
        nonlocal inside, most
        if step == 1:
            inside += 1
            most = max(most, inside)
        if step == steps:
            inside -= 1

    wishes = [Wish("a rocket", 64, 64, seed, 3) for seed in range(3)]
    alone = [pixels(studio.windowed(wish, studio.dense(wish), 2, PLAIN).drawn.image) for wish in wishes]
    found = {}

    def ask(number):
        here.wait()
        own = studio.dense(wishes[number], on_step)
        found[number] = pixels(studio.windowed(wishes[number], own, 2, PLAIN, on_step).drawn.image)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert all((found[number] == alone[number]).all() for number in range(3))


def test_stopping_ends_the_image_after_its_step_and_nothing_more_is_drawn():
    studio, began, steps = studio_of(), threading.Event(), []
    ended = []

    def on_step(step, total):
        steps.append(step)
        began.set()

    def draw():
        try:
            studio.dense(Wish("a", 64, 64, 0, 1000), on_step)
        except Stopped as stopped:
            ended.append(stopped)

    thread = threading.Thread(target=draw)
    thread.start()
    began.wait()
    assert studio.stop(60)
    with pytest.raises(Stopped):
        studio.dense(Wish("b", 64, 64, 0, 2))
    thread.join()
    assert len(ended) == 1
    assert len(steps) < 1000


def test_sizes_around_the_pipeline_s_own_are_ones_that_it_draws():
    ready = check_play(PlaySettings(device="cpu"))
    studio = Studio(ready, load_play(ready))
    assert studio.sizes[0] == (128, 128)
    assert len(studio.sizes) == len(set(studio.sizes)) == 6
    assert all(height % studio.px == width % studio.px == 0 for height, width in studio.sizes)
    assert studio.first[0] == studio.first[1].radius == 4
    assert studio.steps == 16
    assert studio.name == EMBEDDED


@pytest.mark.parametrize("text_len", [0, 16])
def test_a_token_s_line_counts_what_it_sees(studio, text_len):
    windowed = studio.windowed(WISH, studio.dense(WISH), 3, PLAIN)
    windowed = replace(windowed, work=replace(windowed.work, layout=Layout(8, 12, text_len)))
    line = of_token(Grid(8, 12, 8, 6), (0, 0), windowed)
    assert "row 0, column 0 sees **9 of 96** image tokens (9.4%)" in line
    assert ("text tokens" in line) == bool(text_len)
