"""The page, made with Gradio: settings on the left, both images on the right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from flexclear.common.choices import EMBEDDED
from flexclear.play.looking import Grid, shown, with_window
from flexclear.play.studio import Drawn, Stopped, Studio, Windowed, Wish
from flexclear.play.words import HINT, NO_GRID, of_token, table

PROMPT = "a red apple on a blue background"
MOST_STEPS = 50

PROGRESS = gr.Progress()
"""As a default value, it makes Gradio pass an object that reports progress to the visitor's page."""

CSS = """
.gradio-container { max-width: 1240px !important; }
.drawn img { width: 100%; height: 100%; object-fit: contain; cursor: crosshair; }
.told table { width: 100%; display: table; font-size: 0.9em; }
.told td, .told th { padding: 0.3em 0.8em !important; }
.told td:nth-child(n+2) { white-space: nowrap; }
"""


@dataclass(frozen=True)
class Pair:
    """Both images on one visitor's page, kept for drawing the windows of their tokens."""

    dense: Drawn
    windowed: Windowed
    grid: Grid


def make_page(studio: Studio, describe: Callable[[Exception], str]) -> gr.Blocks:
    """Make the page, without serving it.

    Args:
        studio: draws the images.
        describe: turns an error into words for the visitor.
    """
    sizes = {f"{height} x {width}": (height, width) for height, width in studio.sizes}
    weights = {choice.label: choice for choice in studio.weights}
    radius, first_weights = studio.first

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        """Show errors of drawing as messages on the page."""
        try:
            yield
        except Stopped as error:
            raise gr.Error("flexclear play has been ended", print_exception=False) from error
        except Exception as error:
            raise gr.Error(describe(error), print_exception=False) from error

    def draw(
        prompt: str, size: str, radius: int, label: str, seed: int | None, steps: int, progress: Any = PROGRESS
    ) -> Iterator[Any]:
        with told():
            if seed is None:
                raise ValueError("the seed is empty; give a number, such as 0")
            wish = Wish(prompt, *sizes[size], int(seed), int(steps))
            studio.check(wish, int(radius))
            dense = studio.dense(wish, _steps(progress, "dense"))
        yield shown(dense.image), gr.skip(), gr.skip(), gr.skip(), None
        with told():
            windowed = studio.windowed(
                wish, dense, int(radius), weights[label], _steps(progress, f"window, r = {int(radius)}")
            )
        grid = Grid.of(windowed.drawn.image, windowed.work.layout)
        said = _strangers(prompt) if studio.name == EMBEDDED else ""
        yield (
            shown(dense.image),
            gr.update(value=shown(windowed.drawn.image), label=f"window, r = {windowed.radius}"),
            table(dense, windowed) + said,
            NO_GRID if grid is None else HINT,
            None if grid is None else Pair(dense, windowed, grid),
        )

    def look(pair: Pair | None, event: gr.SelectData) -> Any:
        if pair is None:
            return gr.skip(), gr.skip(), gr.skip()
        token = pair.grid.token_at(*event.index)
        return (
            with_window(pair.dense.image, pair.grid, token, None),
            with_window(pair.windowed.drawn.image, pair.grid, token, pair.windowed.radius),
            of_token(pair.grid, token, pair.windowed),
        )

    def radius_of(label: str) -> Any:
        trained = weights[label].radius
        return gr.skip() if trained is None else min(trained, studio.largest_radius)

    with gr.Blocks(title=f"flexclear play: {studio.name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"## flexclear play\n{type(studio.pipe).__name__} **{studio.name}**: dense attention beside windows, from the same "
            f"noise. A token is {studio.px} x {studio.px} pixels."
        )
        pair = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox(PROMPT, label="prompt", lines=2, elem_id="prompt")
                size = gr.Dropdown(list(sizes), value=next(iter(sizes)), label="height x width, pixels", elem_id="size")
                slider = gr.Slider(
                    1,
                    studio.largest_radius,
                    value=radius,
                    step=1,
                    label="window radius r, tokens",
                    elem_id="radius",
                )
                choice = gr.Dropdown(
                    list(weights), value=first_weights.label, label="weights of the window", elem_id="weights"
                )
                steps = gr.Slider(
                    1, max(MOST_STEPS, studio.steps), value=studio.steps, step=1, label="steps", elem_id="steps"
                )
                seed = gr.Number(0, label="seed", precision=0, elem_id="seed")
                at_once = gr.Checkbox(True, label="draw at every change", elem_id="at-once")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=5, min_width=480):
                with gr.Row():
                    images = [
                        gr.Image(
                            label=label,
                            elem_id=name,
                            elem_classes="drawn",
                            format="png",
                            type="pil",
                            interactive=False,
                            height=400,
                            buttons=["download", "fullscreen"],
                        )
                        for label, name in (("dense", "dense"), (f"window, r = {radius}", "windowed"))
                    ]
                token = gr.Markdown(HINT, elem_id="token")
                facts = gr.Markdown(elem_id="facts", elem_classes="told")

        given, results = [prompt, size, slider, choice, seed, steps], [*images, facts, token, pair]
        one_at_a_time: dict[str, Any] = {
            "concurrency_limit": 1,
            "concurrency_id": "pipeline",
            "trigger_mode": "always_last",
            "show_progress_on": images,
        }

        def draw_if(
            at_once: bool,
            prompt: str,
            size: str,
            radius: int,
            label: str,
            seed: int | None,
            steps: int,
            progress: Any = PROGRESS,
        ) -> Iterator[Any]:
            if at_once and seed is not None:  # It is empty while it is being retyped.
                yield from draw(prompt, size, radius, label, seed, steps, progress)
            else:
                yield tuple(gr.skip() for _ in results)

        gr.on([button.click, prompt.submit, page.load], draw, given, results, api_name="draw", **one_at_a_time)
        gr.on(
            [size.input, slider.input, seed.input, steps.input],
            draw_if,
            [at_once, *given],
            results,
            api_visibility="private",
            **one_at_a_time,
        )
        choice.input(radius_of, choice, slider, queue=False, api_visibility="private").then(
            draw_if, [at_once, *given], results, api_visibility="private", **one_at_a_time
        )
        for image in images:
            image.select(look, pair, [*images, token], show_progress="hidden", api_visibility="private")
    return page


def _steps(progress: Any, what: str) -> Callable[[int, int], None]:
    return lambda step, steps: progress((step, steps), desc=what, unit="steps")


def _strangers(prompt: str) -> str:
    from flexclear.embedded import unknown_words

    found = unknown_words(prompt)
    return f"\n\nThe embedded model was not trained on: {', '.join(found)}. It draws all the same." if found else ""
