"""What is peculiar to Chroma: how masks of its text are read; its pipelines end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.families import tokens
from flexclear.runtime.plan import plans

from contract.oracle import expected, windowed
from contract.shapes import Shape
from contract.table import CHROMA
from helpers.models import chroma_call, raster_ids, text_mask, tiny_chroma


def run(model, call, **kwargs):
    with torch.no_grad():
        return model(**call, **kwargs).sample


def test_one_mask_may_serve_the_whole_batch():
    original = tiny_chroma()
    model = flexclear.transform(copy.deepcopy(original), r=3, backend="sdpa")
    for kind in ("bool", "float"):
        call = chroma_call(9, 10, 12, batch=2) | {"attention_mask": text_mask(kind, 1, 12, 90)}
        reference = expected(CHROMA, original, Shape(9, 10, 12, 2), call)
        assert (run(model, call) - reference).abs().max() <= 1e-4


def test_a_mask_that_keeps_all_text_is_no_mask():
    model = flexclear.transform(tiny_chroma(), r=3, backend="sdpa")
    call = chroma_call(9, 10, 12)
    plans.clear()
    plain = run(model, call)
    assert torch.equal(run(model, call | {"attention_mask": torch.ones(1, 102, dtype=torch.bool)}), plain)
    assert (plans.stats().hits, plans.stats().misses) == (1, 1)
    assert (run(model, call | {"attention_mask": torch.ones(1, 102)}) - plain).abs().max() <= 1e-5


def test_a_mask_is_read_once_and_again_when_it_was_changed(monkeypatch):
    readings = []

    def counted(mask):
        readings.append(mask)
        return read(mask)

    read = tokens._last_hidden
    monkeypatch.setattr(tokens, "_last_hidden", counted)
    model = flexclear.transform(tiny_chroma(), r=3, backend="sdpa")
    call = chroma_call(5, 6, 4) | {"attention_mask": torch.ones(1, 34, dtype=torch.bool)}
    before = run(model, call)
    assert torch.equal(run(model, call), before)
    assert len(readings) == 1
    call["attention_mask"][0, 2:4] = False
    assert (run(model, call) - before).abs().max() > 1e-3
    assert len(readings) == 2


BAD_MASKS = {
    "hides an image token": (
        torch.arange(76)[None] != 30,
        r"attention_mask hides image tokens \(the last one that it hides is number 18 of 64\)",
    ),
    "text only": (torch.ones(1, 12, dtype=torch.bool), r"\[1, 12 \+ 64\], got torch.bool of shape \(1, 12\)"),
    "another batch": (torch.ones(3, 76, dtype=torch.bool), r"got torch.bool of shape \(3, 76\)"),
    "whole numbers": (torch.ones(1, 76, dtype=torch.int64), r"bool or floating-point tensor .* got torch.int64"),
    "no tensor": ([True] * 76, r"got \[True"),
}


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_a_bad_mask_is_named_before_any_work(mask, message):
    model = flexclear.transform(tiny_chroma(), r=2, backend="sdpa")
    plans.clear()
    with pytest.raises(ValueError, match=message):
        run(model, chroma_call(8, 8, 12) | {"attention_mask": mask})
    assert plans.stats().misses == 0


def test_other_bad_calls_are_named_before_any_work():
    model = flexclear.transform(tiny_chroma(), r=2, backend="sdpa")
    call = chroma_call(8, 8, 4)
    plans.clear()
    with pytest.raises(ValueError, match="do not hold the 4 x 8 = 32 image tokens"):
        run(model, call | {"img_ids": raster_ids(4, 8)})
    with pytest.raises(ValueError, match="needs img_ids as a tensor, got None"):
        run(model, call | {"img_ids": None})
    with pytest.raises(ValueError, match=r"controlnet_block_samples\[0\] of shape \(1, 65, 32\) does not hold one"):
        run(model, call, controlnet_block_samples=[torch.randn(1, 65, 32)])
    with pytest.raises(ValueError, match="joint_attention_kwargs holds an attention_mask"):
        run(model, call, joint_attention_kwargs={"attention_mask": torch.ones(68, 68)})
    assert plans.stats().misses == 0
    with pytest.raises(ValueError, match="down_factor: down-sampled keys are defined for FluxTransformer2DModel"):
        flexclear.transform(tiny_chroma(), r=2, down_factor=2)


def test_eight_bit_weights_come_back_from_a_file_although_a_buffer_is_not_in_it(tmp_path):
    from flexclear.compile import load_quantized, quantize, save_quantized

    model, call = tiny_chroma(), chroma_call(8, 8, 4)
    assert {name for name, _ in model.named_buffers()} - model.state_dict().keys(), "all of its buffers are saved"
    quantize(model, "weight_only", min_features=16)
    file = save_quantized(model, tmp_path / "model.safetensors")
    assert torch.equal(run(load_quantized(tiny_chroma(seed=1), file), call), run(model, call))


TEXT_LEN = 40


@pytest.fixture(scope="module")
def pipe():
    """A ChromaPipeline of small parts with random weights; the embedded model's T5 tokenizer and VAE."""
    from diffusers import ChromaPipeline, FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, T5EncoderModel

    embedded = flexclear.embedded.pipeline()
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=len(embedded.tokenizer_2), d_model=12, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    made = ChromaPipeline(
        transformer=tiny_chroma(in_channels=32),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=embedded.vae,
        text_encoder=T5EncoderModel(t5).eval(),
        tokenizer=embedded.tokenizer_2,
    )
    made.set_progress_bar_config(disable=True)
    return made


def picture(pipe, size, prompt="a red apple", **kwargs):
    return pipe(
        prompt,
        **dict(zip(("height", "width"), size, strict=True)),
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=TEXT_LEN,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **kwargs,
    ).images


def compare(pipe, size, **kwargs):
    """The pipeline's image against its own under the dense mask, and against the one of the dense model."""
    dense = picture(pipe, size, **kwargs)
    with windowed(CHROMA, pipe.transformer, Shape(size[0] // 8, size[1] // 8, TEXT_LEN)):
        masked = picture(pipe, size, **kwargs)
    try:
        ours = picture(flexclear.transform(pipe, r=3, backend="sdpa"), size, **kwargs)
    finally:
        flexclear.restore(pipe)
    assert (ours - masked).abs().max() <= 1e-3
    assert (dense - masked).abs().max() > 1e-2, "the window makes no difference here"
    assert torch.equal(picture(pipe, size, **kwargs), dense)
    return ours


@pytest.mark.parametrize("size", [(96, 96), (72, 120)])
def test_the_pipeline_draws_what_the_original_draws_under_the_dense_mask(pipe, size):
    compare(pipe, size)


def test_the_pipeline_hides_padding_when_it_is_given_bool_masks(pipe):
    parts = pipe.encode_prompt("a red apple", "a blurred picture", max_sequence_length=TEXT_LEN)
    embeds, _, mask, negative_embeds, _, negative_mask = parts
    assert mask.dtype == torch.float32
    assert not mask.all()
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}
    added, hidden = (
        compare(pipe, (72, 96), **given, prompt_attention_mask=ours, negative_prompt_attention_mask=negative)
        for ours, negative in ((mask, negative_mask), (mask.bool(), negative_mask.bool()))
    )
    assert (added - hidden).abs().max() > 1e-3


def test_image_to_image_shares_the_windowed_transformer(pipe):
    from diffusers import ChromaImg2ImgPipeline

    guided = ChromaImg2ImgPipeline(**{name: part for name, part in pipe.components.items() if part is not None})
    guided.set_progress_bar_config(disable=True)
    compare(guided, (72, 120), image=Image.radial_gradient("L").resize((120, 72)).convert("RGB"), strength=0.9)
