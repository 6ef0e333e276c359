"""A transformed Chroma equals the unmodified one given the dense boolean mask, over masks of its text padding."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from PIL import Image

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.families import chroma
from flexclear.families.chroma_attention import ChromaIPWindowProcessor, ChromaWindowProcessor
from flexclear.masks import Disc, Layout, dense_mask
from flexclear.runtime.plan import plans

from models import raster_ids

CPU = torch.device("cpu")
SHAPES = [(16, 16, 32), (9, 13, 20), (24, 7, 77)]
KINDS = ["no mask", "bool", "float"]


def tiny_chroma(seed=0, **config):
    """A ChromaTransformer2DModel of 2 + 2 blocks, 2 heads x 16, random weights, in eval mode."""
    torch.manual_seed(seed)
    sizes = {
        "in_channels": 8,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    }
    model = ChromaTransformer2DModel(**{**sizes, **config}).eval()
    torch.nn.init.normal_(model.distilled_guidance_layer.out_proj.bias)  # gates
    return model


def text_mask(kind, batch, text_len, image_len):
    """The mask of a call whose samples have different numbers of text tokens, None for ``"no mask"``."""
    if kind == "no mask":
        return None
    mask = torch.ones(batch, text_len + image_len, dtype=torch.bool)
    for sample in range(batch):
        mask[sample, text_len - 1 - (3 + 2 * sample) % text_len : text_len] = False
    return mask if kind == "bool" else mask.float()


def chroma_call(height, width, text_len, batch=1, seed=0, kind="no mask"):
    """Keyword arguments of a Chroma call with random inputs."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, height * width, 8, generator=generator),
        "encoder_hidden_states": 2 * torch.randn(batch, text_len, 12, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": raster_ids(height, width),
        "txt_ids": torch.zeros(text_len, 3),
        "attention_mask": text_mask(kind, batch, text_len, height * width),
    }


class Masked:
    """diffusers' own processor, whose mask also has the window: a bool mask and it, or a float one with -inf."""

    window = None

    def __call__(self, *args, attention_mask=None, **kwargs):
        if attention_mask is None:
            both = self.window
        elif attention_mask.dtype == torch.bool:
            both = attention_mask & self.window
        else:
            both = attention_mask.masked_fill(~self.window, -torch.inf)
        return super().__call__(*args, attention_mask=both, **kwargs)


class MaskedFlux(Masked, FluxAttnProcessor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return super().__call__(
            attn, hidden_states, encoder_hidden_states,
            attention_mask=attention_mask, image_rotary_emb=image_rotary_emb,
        )  # fmt: skip


class MaskedIPAdapter(Masked, FluxIPAdapterAttnProcessor):
    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
        ip_hidden_states=None, ip_adapter_masks=None,
    ):  # fmt: skip
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb, ip_hidden_states=ip_hidden_states,
        )  # fmt: skip


def under_the_dense_mask(model, height, width, text_len, r):
    """A copy of the stock model whose processors add the dense mask, in raster order."""
    model = copy.deepcopy(model)
    window = dense_mask(Layout(height, width, text_len, order="raster"), Disc(r))
    for processor in {id(p): p for p in model.attn_processors.values()}.values():
        adapter = isinstance(processor, FluxIPAdapterAttnProcessor)
        processor.__class__ = MaskedIPAdapter if adapter else MaskedFlux
        processor.window = window
    return model


def run(model, call, **kwargs):
    with torch.no_grad():
        return model(**call, **kwargs).sample


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_transformed_model_equals_the_original_under_the_dense_mask(kind, order, batch):
    original = tiny_chroma()
    model = flexclear.transform(copy.deepcopy(original), r=3, backend="sdpa", order=order)
    for height, width, text_len in SHAPES:
        call = chroma_call(height, width, text_len, batch, kind=kind)
        reference = run(under_the_dense_mask(original, height, width, text_len, 3), call)
        assert (run(model, call) - reference).abs().max() <= 1e-4
        assert (run(original, call) - reference).abs().max() > 1e-3, "the window makes no difference here"
        other = run(under_the_dense_mask(original, height, width, text_len, 3), call | {"attention_mask": None})
        assert kind == "no mask" or (other - reference).abs().max() > 1e-3, "the padding makes no difference here"


@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
def test_compiled_flex_attention_equals_the_original_under_the_dense_mask():
    original = tiny_chroma(num_layers=1, num_single_layers=1)
    model = flexclear.transform(copy.deepcopy(original), r=3, backend="flex")
    call = chroma_call(9, 13, 20, batch=2, kind="float")
    reference = run(under_the_dense_mask(original, 9, 13, 20, 3), call)
    assert (run(model, call) - reference).abs().max() <= 1e-4


def test_one_mask_may_serve_the_whole_batch():
    original = tiny_chroma()
    model = flexclear.transform(copy.deepcopy(original), r=3, backend="sdpa")
    for kind in ("bool", "float"):
        call = chroma_call(9, 10, 12, batch=2) | {"attention_mask": text_mask(kind, 1, 12, 90)}
        reference = run(under_the_dense_mask(original, 9, 10, 12, 3), call)
        assert (run(model, call) - reference).abs().max() <= 1e-4


def test_layers_left_dense_keep_the_text_mask():
    original = tiny_chroma()
    model = flexclear.transform(copy.deepcopy(original), r=None, backend="sdpa")
    for kind in KINDS:
        call = chroma_call(9, 10, 12, batch=2, kind=kind)
        assert (run(model, call) - run(original, call)).abs().max() <= 1e-5


def test_text_that_is_padding_has_no_say_in_the_image():
    model = flexclear.transform(tiny_chroma(), r=3, backend="sdpa")
    call = chroma_call(9, 10, 12, batch=2, kind="bool")
    hidden = ~call["attention_mask"][:, :12]
    assert 0 < hidden.sum() < hidden.numel()
    changed = call | {"encoder_hidden_states": call["encoder_hidden_states"] + 5 * hidden[:, :, None]}
    assert torch.equal(run(model, changed), run(model, call))


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

    read = chroma._last_hidden
    monkeypatch.setattr(chroma, "_last_hidden", counted)
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


def test_restore_is_bit_identical_and_leaves_nothing_behind():
    model = tiny_chroma()
    call = chroma_call(9, 10, 12, kind="bool")
    before, processors = run(model, call), model.attn_processors
    flexclear.transform(model, r=3, backend="sdpa")
    assert {type(p) for p in model.attn_processors.values()} == {ChromaWindowProcessor}
    assert len(model.attn_processors) == 4
    run(model, call)
    flexclear.restore(model)
    assert torch.equal(run(model, call), before)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_controlnet_residuals_follow_the_token_order():
    original = tiny_chroma()
    height, width = 12, 10
    call = chroma_call(height, width, 16, batch=2, kind="bool")
    call["controlnet_block_samples"] = [torch.randn(2, height * width, 32) for _ in range(2)]
    call["controlnet_single_block_samples"] = [torch.randn(2, height * width, 32)]
    reference = run(under_the_dense_mask(original, height, width, 16, 3), call)
    model = flexclear.transform(original, r=3, backend="sdpa")
    assert (run(model, call) - reference).abs().max() <= 1e-4


def test_fused_projections_give_the_same_result():
    model = flexclear.transform(tiny_chroma(), r=3, backend="sdpa")
    call = chroma_call(12, 10, 16, kind="bool")
    plain = run(model, call)
    for module in model.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    assert (run(model, call) - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_rotary_base_equals_the_original_with_that_base(kind):
    original = tiny_chroma()
    call = chroma_call(9, 13, 20, batch=2, kind=kind)
    plain = run(under_the_dense_mask(original, 9, 13, 20, 3), call)
    model = flexclear.transform(copy.deepcopy(original), r=3, backend="sdpa", ntk_factor=10.0)
    original.pos_embed.theta *= 10
    reference = run(under_the_dense_mask(original, 9, 13, 20, 3), call)
    assert (run(model, call) - reference).abs().max() <= 1e-4
    assert (plain - reference).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_proportional_attention_scales_the_queries_and_not_what_a_mask_adds(kind):
    original = tiny_chroma()
    call = chroma_call(9, 13, 20, batch=2, kind=kind)
    model = flexclear.transform(copy.deepcopy(original), r=3, backend="sdpa", proportional_attention=True)
    gain = math.sqrt(math.log(9 * 13 + 20, 4608))
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):
                parameter.mul_(gain)
    reference = run(under_the_dense_mask(original, 9, 13, 20, 3), call)
    assert (run(model, call) - reference).abs().max() <= 1e-4
    with flexclear.override(proportional_attention=False):
        assert (run(model, call) - reference).abs().max() > 1e-3


def gradients(model, call):
    model.zero_grad()
    model(**call).sample.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_training_has_the_gradients_of_the_dense_mask_with_and_without_checkpointing(kind):
    original = tiny_chroma().train()
    call = chroma_call(9, 10, 12, batch=2, kind=kind)
    theirs = gradients(under_the_dense_mask(original, 9, 10, 12, 3), call)
    model = flexclear.transform(original, r=3)
    ours = gradients(model, call)
    model.enable_gradient_checkpointing()
    again = gradients(model, call)
    assert len(ours) > 50
    for a, b, c in zip(ours, again, theirs, strict=True):
        assert torch.allclose(a, c, atol=1e-6)
        assert torch.allclose(b, a, atol=1e-7)


def test_checkpointing_with_another_rotary_base_has_the_same_gradients():
    model = flexclear.transform(tiny_chroma().train(), r=3, ntk_factor=10.0)
    call = chroma_call(9, 10, 12, kind="bool")
    plain = gradients(model, call)
    model.enable_gradient_checkpointing()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, gradients(model, call), strict=True))


def test_checkpointed_blocks_compile_into_whole_graphs():
    model = flexclear.transform(tiny_chroma(num_layers=1, num_single_layers=1).train(), r=3, backend="sdpa")
    model.enable_gradient_checkpointing()
    call = chroma_call(5, 6, 4, kind="bool")
    plain = gradients(model, call)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, gradients(model, call), strict=True))


def test_a_checkpointed_block_that_is_called_alone_is_refused():
    model = flexclear.transform(tiny_chroma(), r=3)
    block = model.single_transformer_blocks[0]
    with pytest.raises(ValueError, match="was called without its window"):
        block(torch.randn(1, 8, 32), torch.randn(1, 3, 32))


def with_ip_adapter(model, scale=0.7):
    """An IP-Adapter of two picture tokens in the double-stream blocks, as ``load_ip_adapter`` puts it there."""
    torch.manual_seed(7)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 12, num_tokens=(2,), scale=scale))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_ip_adapter_gives_what_it_gives_under_the_dense_mask(kind):
    original = with_ip_adapter(tiny_chroma())
    call = chroma_call(9, 13, 20, batch=2, kind=kind)
    seen = {"ip_hidden_states": [torch.randn(2, 2, 12)]}
    reference = run(under_the_dense_mask(original, 9, 13, 20, 3), call, joint_attention_kwargs=seen)
    own, keys = original.attn_processors, set(original.state_dict())
    model = flexclear.transform(original, r=3, backend="sdpa")
    assert type(model.transformer_blocks[0].attn.processor) is ChromaIPWindowProcessor
    assert set(model.state_dict()) == keys
    ours = run(model, call, joint_attention_kwargs=seen)
    assert (ours - reference).abs().max() <= 1e-4
    assert (run(model, call) - ours).abs().max() > 1e-3
    flexclear.restore(model)
    assert all(model.attn_processors[name] is processor for name, processor in own.items())


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
    """The pipeline's picture against its own under the dense mask, and against the one of the dense model."""
    stock = pipe.transformer
    dense = picture(pipe, size, **kwargs)
    pipe.transformer = under_the_dense_mask(stock, size[0] // 8, size[1] // 8, TEXT_LEN, 3)
    expected = picture(pipe, size, **kwargs)
    pipe.transformer = stock
    try:
        ours = picture(flexclear.transform(pipe, r=3, backend="sdpa"), size, **kwargs)
    finally:
        flexclear.restore(pipe)
    assert (ours - expected).abs().max() <= 1e-3
    assert (dense - expected).abs().max() > 1e-2, "the window makes no difference here"
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
