"""A pipeline with two transformers, as Wan 2.2's A14B: both are transformed, restored, explained, quantized and saved."""

from __future__ import annotations

import pytest
import torch

import flexclear
from flexclear.compile import report
from flexclear.compile.quantize import is_quantized, quantize
from flexclear.families import changes
from flexclear.masks import cylinder
from flexclear.runtime.hooks import entry_hook_of

from contract.oracle import RADIUS, far
from contract.pipelines import check_windowed
from contract.rows_video import WAN
from helpers.models_video import tiny_wan
from helpers.pipeline_parts import PROMPTS, draw, lora, quiet
from helpers.pipelines_video import SIZE, TEXT, picture, wan_parts, without_ftfy

STEPS = 4
"""Of which the first two are for the first transformer, by the boundary of ``pipeline``."""
CALL = {
    **SIZE,
    "prompt": PROMPTS[0],
    "negative_prompt": "grey",
    "max_sequence_length": 12,
    "num_inference_steps": STEPS,
}
WINDOW = {"r": RADIUS, "frame_radius": 1, "backend": "sdpa"}


def pipeline(monkeypatch, first=True, second=True, kind="WanPipeline", **config):
    import diffusers

    without_ftfy(monkeypatch, getattr(diffusers, kind))
    models = [
        tiny_wan(seed, text_dim=TEXT, **config) if wanted else None for seed, wanted in enumerate((first, second))
    ]
    boundary = 0.8 if second and first else 1.1 if second else None
    return quiet(getattr(diffusers, kind)(**wan_parts(models[0], transformer_2=models[1], boundary_ratio=boundary)))


def counted(pipe):
    """How often each of its models is called, as it goes on."""
    calls = [0, 0]

    def counting(number):
        def count(*args):
            calls[number] += 1

        return count

    for number, model in enumerate((pipe.transformer, pipe.transformer_2)):
        model.register_forward_pre_hook(counting(number))
    return calls


def windows(pipe):
    return [None if entry_hook_of(model) is None else set(entry_hook_of(model).settings.windows.values())
            for model in (pipe.transformer, pipe.transformer_2)]  # fmt: skip


def test_both_are_windowed_with_a_lora_on_each_and_restored(monkeypatch):
    pipe = pipeline(monkeypatch)
    calls = counted(pipe)

    def load():
        pipe.load_lora_weights(lora(pipe.transformer), adapter_name="first")
        pipe.load_lora_weights(lora(pipe.transformer_2), adapter_name="second", load_into_transformer_2=True)

    check_windowed(pipe, WAN, load, pipe.unload_lora_weights, **CALL)
    assert calls[0] > 0
    assert calls[1] > 0
    assert calls[0] % 2 == calls[1] % 2 == 0
    flexclear.transform(pipe, **WINDOW)
    assert windows(pipe) == [{cylinder(RADIUS, 1)}] * 2
    flexclear.restore(pipe)
    assert windows(pipe) == [None, None]


def test_either_may_be_missing(monkeypatch):
    for missing in ("first", "second"):
        pipe = pipeline(monkeypatch, **{missing: False})
        check_windowed(pipe, WAN, **CALL)
        assert len(flexclear.explain(flexclear.transform(pipe, **WINDOW)).others) == 0


def test_an_image_and_both_are_windowed(monkeypatch):
    import diffusers

    without_ftfy(monkeypatch, diffusers.WanImageToVideoPipeline)
    models = [tiny_wan(seed, text_dim=TEXT, in_channels=12) for seed in range(2)]
    parts = wan_parts(models[0], transformer_2=models[1], boundary_ratio=0.8)
    check_windowed(quiet(diffusers.WanImageToVideoPipeline(**parts)), WAN, **CALL, image=picture())


def test_dense_steps_are_those_of_the_whole_run(monkeypatch):
    """The first step is the first transformer's, the last one the second's."""
    pipe = pipeline(monkeypatch)
    dense = draw(pipe, **CALL)
    local = draw(flexclear.transform(pipe, **WINDOW), **CALL)
    far(local, dense, "the windows")
    seen = []
    for model in (pipe.transformer, pipe.transformer_2):
        flexclear.transform(pipe, **WINDOW, dense_steps=(1, 1))
        entry = entry_hook_of(model)
        plan = entry.plan

        def noting(*args, plan=plan, model=model):
            made = plan(*args)
            seen.append((model is pipe.transformer, made.slots[0].mask is None))
            return made

        entry.plan = noting
        other = pipe.transformer_2 if model is pipe.transformer else pipe.transformer
        flexclear.restore(other)
        draw(pipe, **CALL)
    firsts, seconds = ([dense for first, dense in seen if first is which] for which in (True, False))
    assert firsts == [True] * 2 + [False] * (len(firsts) - 2)  # guidance calls the model twice in each step
    assert seconds == [False] * (len(seconds) - 2) + [True] * 2
    assert len(firsts) + len(seconds) == 2 * STEPS
    flexclear.transform(pipe, **WINDOW, dense_steps=(2, 2))
    assert torch.equal(draw(pipe, **CALL), dense)


def test_an_error_on_the_second_leaves_both_as_they_were(monkeypatch):
    pipe = pipeline(monkeypatch)
    before = draw(pipe, **CALL)
    pipe.transformer_2.blocks[1].attn1.set_processor(lambda *args, **kwargs: None)
    with pytest.raises(TypeError, match=r"blocks\[1\].attn1 has a function"):
        flexclear.transform(pipe, **WINDOW)
    assert windows(pipe) == [None, None]
    pipe.transformer_2.blocks[1].attn1.set_processor(type(pipe.transformer.blocks[0].attn1.processor)())
    flexclear.transform(pipe, **WINDOW)
    with pytest.raises(ValueError, match="names no attention layer"):
        flexclear.transform(pipe, r={"blocks.7": 3, "default": 3}, frame_radius=1)
    assert windows(pipe) == [{cylinder(RADIUS, 1)}] * 2
    assert torch.equal(draw(flexclear.restore(pipe), **CALL), before)


class Interrupted(Exception):
    pass


def test_an_interruption_between_the_two_leaves_both_as_they_were(monkeypatch):
    pipe = pipeline(monkeypatch)
    flexclear.transform(pipe, **WINDOW)
    put = changes.put_hooks

    def interrupted(model, entry):
        if model is pipe.transformer_2:
            raise Interrupted
        put(model, entry)

    monkeypatch.setattr(changes, "put_hooks", interrupted)
    with pytest.raises(Interrupted):
        flexclear.transform(pipe, r=2, frame_radius=0)
    monkeypatch.undo()
    assert windows(pipe) == [{cylinder(RADIUS, 1)}] * 2


def test_both_are_explained(monkeypatch):
    pipe = flexclear.transform(pipeline(monkeypatch), **WINDOW)
    found = flexclear.explain(pipe, height=48, width=64, num_frames=9)
    assert [len(each.layers) for each in (found, *found.others)] == [2, 2]
    text = str(found)
    assert text.count("9 frames of 48 x 64 px: 3 x 3 x 4 = 36 video tokens, 512 of text by cross-attention") == 2
    assert text.count("tube_r3_t1") == 2
    assert "second transformer: WanTransformer3DModel, 2 attention layers" in text
    with pytest.raises(ValueError, match="give height, width and num_frames of a video"):
        flexclear.explain(pipe, height=48, width=64)


def test_both_are_quantized_and_compiled_and_warmed(monkeypatch):
    """The boundary is late, so that one step of the warm-up would run the first alone."""
    one_by_one, pipe = (flexclear.transform(pipeline(monkeypatch, attention_head_dim=32), **WINDOW) for _ in range(2))
    plain = draw(pipe, **CALL)
    for model in (one_by_one.transformer, one_by_one.transformer_2):
        quantize(model, "int8", min_features=16)
    calls = counted(pipe)
    torch.compiler.reset()
    before = report()
    try:
        flexclear.optimize(
            pipe, fp8="int8", min_features=16, backend="eager", dynamic=True, sizes=[(9, 48, 64)], progress=False
        )
        assert is_quantized(pipe.transformer)
        assert is_quantized(pipe.transformer_2)
        assert all(calls), "the warm-up leaves one out"
        made = len(report().since(before).graphs)
        quantized = draw(pipe, **CALL)
        assert torch.equal(quantized, draw(one_by_one, **CALL))
        far(quantized, plain, "eight bits")
        assert len(report().since(before).graphs) == made, "a size that was warmed is compiled again"
    finally:
        torch.compiler.reset()


def test_sizes_of_a_video_are_frames_height_and_width(monkeypatch):
    pipe = pipeline(monkeypatch)
    with pytest.raises(ValueError, match=r"sizes must be \(frames, height, width\), frames of the video and pixels"):
        flexclear.optimize(pipe, backend="eager", sizes=[(48, 64)])


def test_both_are_saved_to_one_file_and_loaded(monkeypatch, tmp_path):
    pipe = pipeline(monkeypatch)
    flexclear.transform(pipe.transformer, **WINDOW)
    flexclear.transform(pipe.transformer_2, r=[2, cylinder(3, 2)], frame_radius="all", backend="sdpa")
    trained, own = draw(pipe, **CALL), windows(pipe)
    path = flexclear.save_weights(pipe, tmp_path / "both.safetensors")
    with torch.no_grad():
        for model in (pipe.transformer, pipe.transformer_2):
            for block in model.blocks:
                block.attn1.to_q.weight.add_(1)
    flexclear.restore(pipe)
    found = flexclear.load_weights(pipe, path)
    assert found.tensors == 2 * 2 * 8
    assert windows(pipe) == own
    for model in (pipe.transformer, pipe.transformer_2):  # as they were
        flexclear.transform(model, r=dict(entry_hook_of(model).settings.windows), backend="sdpa")
    assert torch.equal(draw(pipe, **CALL), trained)


def test_a_file_of_one_is_no_file_of_both(monkeypatch, tmp_path):
    pipe = flexclear.transform(pipeline(monkeypatch), **WINDOW)
    both = flexclear.save_weights(pipe, tmp_path / "both.safetensors")
    one = flexclear.save_weights(pipe.transformer_2, tmp_path / "one.safetensors")
    before = draw(pipe, **CALL)
    with pytest.raises(
        ValueError, match="holds weights of transformer, but the weights of transformer and transformer_2 are"
    ):
        flexclear.load_weights(pipe, one)
    with pytest.raises(
        ValueError, match="holds weights of transformer and transformer_2, but the weights of transformer are"
    ):
        flexclear.load_weights(pipe.transformer, both)
    assert torch.equal(draw(pipe, **CALL), before)
    flexclear.load_weights(pipe.transformer, one)
    for mine, second in zip(pipe.transformer.blocks, pipe.transformer_2.blocks, strict=True):
        assert torch.equal(mine.attn1.to_q.weight, second.attn1.to_q.weight)


def test_what_works_on_one_model_asks_which(monkeypatch):
    from flexclear import parallel
    from flexclear.analysis import observe

    pipe = flexclear.transform(pipeline(monkeypatch), **WINDOW)
    for ask in (
        lambda: parallel.enable(pipe),
        lambda: parallel.enable_dense(pipe),
        lambda: observe(pipe).__enter__(),
    ):
        with pytest.raises(TypeError, match=r"this WanPipeline has 2 transformers.*pass pipe.transformer or"):
            ask()
    assert parallel.disable(pipe) is pipe


def test_generate_keeps_each_transformer_s_window_from_a_file_under_another_backend(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from flexclear.generation.loading import _window
    from flexclear.generation.settings import GenerateSettings

    pipe = pipeline(monkeypatch)
    flexclear.transform(pipe.transformer, cylinder(2, 1))
    flexclear.transform(pipe.transformer_2, cylinder(3, 0))
    file = flexclear.save_weights(pipe, tmp_path / "both.safetensors")
    flexclear.restore(pipe)
    settings = GenerateSettings("embedded", ("text",), tmp_path, backend="sdpa")
    _window(pipe, settings, SimpleNamespace(weights=file), print)
    assert windows(pipe) == [{cylinder(2, 1)}, {cylinder(3, 0)}]
    assert {entry_hook_of(model).settings.backend for model in (pipe.transformer, pipe.transformer_2)} == {"sdpa"}
