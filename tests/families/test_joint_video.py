"""HunyuanVideo, HunyuanVideo 1.5, CogVideoX, Mochi, MiniMax-H3, Cosmos 3: their real pipelines end to end to a saved video,
dense and windowed, with a LoRA; what may not be mixed up in them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image, ImageSequence
from torch.utils._python_dispatch import TorchDispatchMode

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.families import family_of
from flexclear.families.target import latent_frames, px_per_token
from flexclear.masks import all_frames, cylinder
from flexclear.runtime.grid import GridReader

from contract import rows_joint_video as rows
from contract.oracle import RADIUS, TOLERANCE, differ, expected, far, run, same, under
from contract.pipelines import STEPS
from contract.row import FRAME_RADIUS, Row
from contract.shapes import Shape
from helpers import models_joint_video as models
from helpers import pipelines_joint_video as pipelines
from helpers.pipeline_parts import PROMPTS, lora


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        make: makes it.
        row: of its model.
        options: of its call.
        grid: frames, rows and columns of its tokens.
        pixels: frames, height and width of its videos.
        text: tokens of text in each sample's sequence, of a call of the model.
        samples: how many videos it makes.
        name: what the pipeline calls the model that it runs.
    """

    make: Callable[[], Any]
    row: Row
    options: dict[str, Any]
    grid: tuple[int, int, int]
    pixels: tuple[int, int, int]
    text: Callable[[dict[str, Any]], tuple[int, ...]]
    samples: int = 2
    name: str = "transformer"


def words(call: dict[str, Any]) -> tuple[int, ...]:
    return (call["encoder_hidden_states"].shape[1],)


def words_glyphs_image(call: dict[str, Any]) -> tuple[int, ...]:
    names = "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"
    return (sum(call[name].shape[1] for name in names),)


def unpadded(call: dict[str, Any]) -> tuple[int, ...]:
    return tuple(sorted(set(call["encoder_attention_mask"].sum(1).tolist())))


ONE = {"prompt": PROMPTS[0], "image": pipelines.picture()}
HUNYUAN_FROM_IMAGE = {**pipelines.HUNYUAN_VIDEO_FROM_IMAGE, **ONE}
SMALL = (3, 5, 7)

CASES = {
    "hunyuan": Case(pipelines.hunyuan_video, rows.HUNYUAN_VIDEO, pipelines.HUNYUAN_VIDEO, SMALL, (9, 80, 112), words),
    "hunyuan, first frame": Case(
        functools.partial(pipelines.hunyuan_video_from_image, "token_replace"),
        rows.HUNYUAN_VIDEO_I2V,
        HUNYUAN_FROM_IMAGE,
        SMALL,
        (9, 80, 112),
        words,
        samples=1,
    ),
    "hunyuan, channels": Case(
        functools.partial(pipelines.hunyuan_video_from_image, "latent_concat"),
        rows.HUNYUAN_VIDEO,
        HUNYUAN_FROM_IMAGE,
        SMALL,
        (5, 80, 112),
        words,
        samples=1,
    ),
    "hunyuan 1.5": Case(
        pipelines.hunyuan_video15,
        rows.HUNYUAN_VIDEO15,
        pipelines.HUNYUAN_VIDEO15,
        SMALL,
        (9, 40, 56),
        words_glyphs_image,
    ),
    "hunyuan 1.5, image": Case(
        functools.partial(pipelines.hunyuan_video15, image=True),
        rows.HUNYUAN_VIDEO15,
        {"num_frames": 9, "negative_prompt": "grey", **ONE},
        (3, 6, 9),
        (9, 48, 72),
        words_glyphs_image,
        samples=1,
    ),
    "cogvideox": Case(pipelines.cogvideox, rows.COGVIDEOX, pipelines.COGVIDEOX, SMALL, (9, 80, 112), words),
    "cogvideox, image": Case(
        functools.partial(pipelines.cogvideox, image=True),
        rows.COGVIDEOX,
        {**pipelines.COGVIDEOX, **ONE},
        SMALL,
        (9, 80, 112),
        words,
        samples=1,
    ),
    "cogvideox 1.5": Case(
        functools.partial(pipelines.cogvideox, patch_size_t=2),
        rows.COGVIDEOX,
        {**pipelines.COGVIDEOX, "num_frames": 21},
        SMALL,
        (24, 80, 112),  # 6 latents, which is no number of its
        words,
    ),
    "mochi": Case(pipelines.mochi, rows.MOCHI, pipelines.MOCHI, SMALL, (13, 80, 112), unpadded),
    "minimax h3": Case(
        pipelines.minimax_h3,
        rows.MINIMAX_H3,
        {**pipelines.MINIMAX_H3, "prompt": PROMPTS[0]},
        (37, 3, 4),
        (124, 96, 128),
        lambda call: (len(call["position_ids"]) - 37 * 3 * 4,),
        samples=1,
    ),
    "minimax h3, keyframe": Case(
        pipelines.minimax_h3,
        rows.MINIMAX_H3,
        {**pipelines.MINIMAX_H3, **ONE},
        (37, 3, 4),
        (124, 96, 128),
        lambda call: (len(call["position_ids"]) - 37 * 3 * 4,),
        samples=1,
    ),
    "minimax h3, reference": Case(
        functools.partial(pipelines.minimax_h3, reference=True),
        rows.MINIMAX_H3,
        {**pipelines.MINIMAX_H3, "prompt": PROMPTS[0], "references": pipelines.minimax_h3_references()},
        (37, 3, 4),
        (124, 96, 128),
        lambda call: (len(call["position_ids"]) - 37 * 3 * 4,),
        samples=1,
        name="transformer_ref",
    ),
    "cosmos 3": Case(
        pipelines.cosmos3,
        rows.COSMOS3,
        {**pipelines.COSMOS3, "prompt": PROMPTS[0]},
        (3, 3, 5),
        (9, 96, 160),
        lambda call: (call["und_len"],),
        samples=1,
    ),
    "cosmos 3, image": Case(
        pipelines.cosmos3,
        rows.COSMOS3,
        {**pipelines.COSMOS3, **ONE},
        (3, 3, 5),
        (9, 96, 160),
        lambda call: (call["und_len"],),
        samples=1,
    ),
}


@contextlib.contextmanager
def windowed(case: Case, model):
    """Each call of a stock model under the window of its own text, by ``contract.oracle``."""
    plain = model.forward
    frames, height, width = case.grid

    @functools.wraps(plain)
    def forward(*args, **call):
        lengths = case.text(call)
        row = dataclasses.replace(case.row, text_lens=lambda shape: lengths, other_lens=lambda shape: ())
        with under(row, Shape(height, width, max(lengths), frames=frames)):
            return plain(*args, **call)

    with mock.patch.object(model, "forward", forward):
        yield


@pytest.mark.kept("hunyuan", "hunyuan 1.5", "cogvideox", "minimax h3", "mochi")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_pipeline_makes_the_video_that_the_plain_one_makes_under_the_dense_mask(case, tmp_path):
    """And restored the one that it made before, bit by bit; a LoRA counts alike if it is loaded before or after."""
    pipe = case.make()
    model = getattr(pipe, case.name)
    frames, height, width = case.pixels
    assert latent_frames(pipe, case.options["num_frames"]) == case.grid[0]
    assert (height // px_per_token(pipe), width // px_per_token(pipe)) == case.grid[1:]

    def draw(decode=False):
        return pipelines.draw(pipe, decode=decode, **case.options)

    def transformed():
        flexclear.transform(pipe, r=RADIUS, frame_radius=FRAME_RADIUS, backend="sdpa")
        return draw()

    def right():
        with windowed(case, model):
            return draw()

    def near(found, wanted, what):
        assert differ(found, wanted) <= STEPS * TOLERANCE, (what, differ(found, wanted))

    dense, plain = draw(), right()
    far(dense, plain, "the window")
    near(transformed(), plain, "the window")
    video = draw(decode=True)
    assert video.shape == (case.samples, frames, 3, height, width)
    pipelines.save_gif(video[0], tmp_path / "video.gif")
    with Image.open(tmp_path / "video.gif") as saved:
        assert saved.size == (width, height)
        lasts = [each.info["duration"] for each in ImageSequence.Iterator(saved)]
        assert sum(lasts) == frames * pipelines.MILLISECONDS
    model.load_lora_adapter(lora(model, prefix=""), prefix=None)
    late = draw()
    flexclear.restore(pipe)
    adapted = right()
    far(plain, adapted, "the LoRA")
    near(late, adapted, "a LoRA that is loaded later")
    near(transformed(), adapted, "a LoRA that is loaded before")
    model.unload_lora()
    near(draw(), plain, "a LoRA that is unloaded")
    flexclear.restore(pipe)
    assert torch.equal(draw(), dense)


def facts(model, call):
    return family_of(model).read(model, call, GridReader())


TEXT_LAST = {
    "hunyuan": (models.tiny_hunyuan_video, models.hunyuan_video_call),
    "hunyuan 1.5": (models.tiny_hunyuan_video15, models.hunyuan_video15_call),
    "mochi": (models.tiny_mochi, models.mochi_call),
}


@pytest.mark.parametrize(("make", "call"), TEXT_LAST.values(), ids=TEXT_LAST)
def test_frames_are_those_behind_the_vae_and_the_patches(make, call):
    """Not the pixels' and not time behind rows: a clip of 5 x 3 x 4 tokens is none of 3 x 5 x 4."""
    found = facts(make(), call(5, 3, 4, 9))
    assert (found.frames, found.grids) == (5, ((3, 4),))
    other = facts(make(), call(3, 5, 4, 9))
    assert (other.frames, other.grids) == (3, ((5, 4),))


def test_frames_of_cogvideox_come_before_its_channels():
    found = facts(models.tiny_cogvideox(), models.cogvideox_call(5, 3, 4, 9))
    assert (found.frames, found.grids) == (5, ((3, 4),))
    two = facts(models.tiny_cogvideox(patch_size_t=2), models.cogvideox_call(3, 5, 4, 9, patch=2))
    assert (two.frames, two.grids) == (3, ((5, 4),))
    model = flexclear.transform(models.tiny_cogvideox(patch_size_t=2), r=RADIUS, frame_radius=1, backend="sdpa")
    with pytest.raises(ValueError, match=r"latents of 5 x 6 x 8 do not divide into the patches of 2 x 2 x 2"):
        run(model, {**models.cogvideox_call(5, 3, 4, 9), "image_rotary_emb": None})


def test_positions_of_another_clip_are_refused():
    model = flexclear.transform(models.tiny_cogvideox(), r=RADIUS, frame_radius=1, backend="sdpa")
    call = {
        **models.cogvideox_call(3, 5, 7, 9),
        "image_rotary_emb": models.cogvideox_call(3, 5, 6, 9)["image_rotary_emb"],
    }
    with pytest.raises(ValueError, match=r"has positions of 90 tokens, and hidden_states .* are 3 x 5 x 7 = 105"):
        run(model, call)


@pytest.mark.parametrize("video", rows.ROWS, ids=lambda video: video.name)
@pytest.mark.parametrize("window", [all_frames(8), cylinder(8, 1)], ids=["all frames", "cylinder"])
def test_a_window_over_everything_is_the_dense_model(video, window):
    model, call = video.build(head_64=True), video.call(Shape(4, 5, 9, 2, frames=2))
    dense = run(model, call)
    same(run(flexclear.transform(model, r=window, backend="sdpa"), call), dense)


def test_the_first_frame_keeps_its_own_time_and_sees_what_it_sees():
    """``token_replace``: the first frame's tokens are modulated apart, by their place. In another order they would be others."""
    row, shape = rows.HUNYUAN_VIDEO_I2V, Shape(6, 5, 9, 2, frames=4)
    model = row.build(head_64=True)
    plain, call = copy.deepcopy(model), row.call(shape)
    flexclear.transform(model, r=RADIUS, frame_radius=FRAME_RADIUS, backend="sdpa")
    same(run(model, call), expected(row, plain, shape))
    for blocks in (plain.transformer_blocks, plain.single_transformer_blocks):
        for block in blocks:
            norms = [norm for name, norm in block.named_children() if name in ("norm", "norm1")]
            for norm in norms:
                norm.forward = functools.partial(misplaced, norm, type(norm).forward)
    far(expected(row, plain, shape), run(model, call), "the first frame")


def misplaced(norm, forward, hidden_states, emb, token_replace_emb, first_frame_num_tokens):
    """Tokens in reverse, so that others are taken for the first frame's."""
    out = forward(norm, hidden_states.flip(1), emb, token_replace_emb, first_frame_num_tokens)
    return (out[0].flip(1), *out[1:])


def test_the_image_of_cogvideox_is_further_channels_of_one_grid():
    model = models.tiny_cogvideox(in_channels=2 * models.CHANNELS)
    call = models.cogvideox_call(3, 5, 7, 9)
    image = torch.zeros_like(call["hidden_states"])
    image[:, 0] = 1.5
    call["hidden_states"] = torch.cat([call["hidden_states"], image], dim=2)
    row = rows.COGVIDEOX
    reference = expected(row, copy.deepcopy(model), Shape(5, 7, 9, frames=3), call)
    flexclear.transform(model, r=RADIUS, frame_radius=FRAME_RADIUS, backend="sdpa")
    same(run(model, call), reference)


class Squares(TorchDispatchMode):
    """Counts the booleans over all pairs of tokens that are made."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.count = length, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        pairs = isinstance(out, torch.Tensor) and out.dtype == torch.bool and out.numel() >= self.length**2
        # A view is none, nor what was there before.
        self.count += pairs and not any(out.untyped_storage() is each.untyped_storage() for each in _tensors(args))
        return out


def _tensors(values):
    return [value for value in values if isinstance(value, torch.Tensor)]


def squares_of(model, call, length):
    with torch.no_grad(), Squares(length) as seen:
        model(**call)
    return seen.count


def test_hunyuan_video_15_builds_no_mask_of_all_pairs_in_its_layers():
    call = models.hunyuan_video15_call(3, 8, 9, 20, 2, padded=True)
    length, counts = 3 * 8 * 9 + 28, {}
    for layers in (1, 3):
        model = models.tiny_hunyuan_video15(num_layers=layers)
        stock = squares_of(model, call, length)
        flexclear.transform(model, r=RADIUS, frame_radius=1, backend="sdpa")
        squares_of(model, call, length)
        counts[layers] = stock, squares_of(model, call, length)
    assert counts[3][0] - counts[1][0] >= 4, "diffusers has changed: it builds none, either"
    assert counts[3][1] == counts[1][1] <= 3, "of the plan, once in a call"


LARGE = """
import resource, torch, flexclear
from helpers import models_joint_video as models
model = models.tiny_hunyuan_video15(num_layers=2, attention_head_dim=64, rope_axes_dim=(16, 24, 24))
flexclear.transform(model, r=3, frame_radius=1, backend="flex")
def run(side):
    with torch.no_grad():
        model(**models.hunyuan_video15_call(3, side, side, 20, padded=True))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(16)
before = run(24)
print(run(72) - before)
"""


@pytest.mark.kept
@pytest.mark.skipif(why_not_compiled(torch.device("cpu")) is not None, reason="FlexAttention cannot be compiled here")
def test_hunyuan_video_15_takes_less_memory_than_one_mask_of_all_pairs():
    """Of 15,580 tokens it would be 231 MiB, of which diffusers holds three at a time in every layer."""
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LARGE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tests)},
        check=True,
    )
    kibibytes = int(done.stdout.split()[-1])
    assert kibibytes * 1024 < (3 * 72 * 72) ** 2


def test_text_that_is_padded_at_its_front_is_refused_by_mochi():
    model = flexclear.transform(models.tiny_mochi(), r=RADIUS, frame_radius=1, backend="sdpa")
    call = models.mochi_call(3, 4, 5, 7, 2, padded=True)
    with pytest.raises(ValueError, match="padding before text or within it"):
        run(model, {**call, "encoder_attention_mask": call["encoder_attention_mask"].flip(1)})


def test_a_prompt_of_mochi_that_is_empty_leaves_the_video_alone():
    model = models.tiny_mochi()
    call = models.mochi_call(3, 4, 5, 7, 2)
    call["encoder_attention_mask"][1] = False
    dense = run(model, call)
    same(run(flexclear.transform(model, r=all_frames(8), backend="sdpa"), call), dense)
