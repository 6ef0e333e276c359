"""What is peculiar to FLUX.2: its caches of keys and values, batched ids; its pipelines end to end."""

from __future__ import annotations

import functools

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.masks import Disc, Layout, dense_mask
from flexclear.runtime.processors import windowed

from helpers.models import flux2_call, tiny_flux2

pytestmark = pytest.mark.filterwarnings("ignore:flexclear. a reference image")
R = 3


def run(model, call, **extra):
    with torch.no_grad():
        return model(**call, **extra).sample


def mask_of(grid, references, text_len, r=R):
    return dense_mask(Layout(*grid, text_len, order="raster", references=references), Disc(r))


@pytest.fixture
def model():
    return tiny_flux2()


def test_both_kinds_of_block_are_windowed_and_given_back(model):
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    call, before = flux2_call((8, 9), (), 6), model.attn_processors
    dense = run(model, call)
    flexclear.transform(model, r=R, backend="sdpa")
    kinds = [type(processor) for processor in model.attn_processors.values()]
    assert kinds == [windowed(Flux2KVAttnProcessor)] * 2 + [windowed(Flux2KVParallelSelfAttnProcessor)] * 2
    assert (run(model, call) - dense).abs().max() > 1e-3
    flexclear.restore(model)
    assert model.attn_processors == before
    assert torch.equal(run(model, call), dense)


def test_ids_without_a_batch_axis_give_the_same(model):
    call = flux2_call((9, 7), ((4, 5),), 6, batch=2)
    flexclear.transform(model, r=R, backend="sdpa")
    batched = run(model, call)
    plain = {**call, "img_ids": call["img_ids"][0], "txt_ids": call["txt_ids"][0]}
    assert torch.equal(run(model, plain), batched)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"kv_cache_mode": "extract", "num_ref_tokens": 20}, "kv_cache_mode='extract' asks FLUX.2 to cache"),
        ({"num_ref_tokens": 20}, "num_ref_tokens=20 asks"),
        ({"joint_attention_kwargs": {"kv_cache_mode": "cached"}}, "kv_cache_mode='cached' asks"),
        (
            {"joint_attention_kwargs": {"attention_mask": torch.ones(1)}},
            "the attention_mask in joint_attention_kwargs must be a bool tensor",
        ),
    ],
)
def test_a_call_whose_attention_is_no_window_is_refused(model, extra, message):
    call = flux2_call((8, 6), ((4, 5),), 5)
    flexclear.transform(model, r=R, backend="sdpa")
    with pytest.raises(ValueError, match=message):
        run(model, call, **extra)
    run(model, call, kv_cache=None, kv_cache_mode=None, num_ref_tokens=0)


def test_a_cache_of_keys_and_values_is_refused_by_its_type(model):
    from diffusers.models.transformers.transformer_flux2 import Flux2KVCache

    flexclear.transform(model, r=R, backend="sdpa")
    with pytest.raises(ValueError, match="kv_cache=a Flux2KVCache asks"):
        run(model, flux2_call((8, 6), (), 5), kv_cache=Flux2KVCache(2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda call: call.pop("txt_ids"), "needs txt_ids as a tensor"),
        (lambda call: call.pop("img_ids"), "needs img_ids as a tensor"),
        (lambda call: call.update(img_ids=call["img_ids"][:, :-1]), "not full grids"),
        (lambda call: call.update(hidden_states=call["hidden_states"][:, :-1]), r"8 x 6 = 48 image tokens"),
    ],
)
def test_a_bad_call_is_named(model, change, message):
    call = flux2_call((8, 6), (), 5)
    change(call)
    flexclear.transform(model, r=R, backend="sdpa")
    with pytest.raises(ValueError, match=message):
        run(model, call)


@functools.cache
def parts():
    """Small scheduler, transformer and autoencoder; one token covers 4 x 4 px."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(1)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    ).eval()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": vae,
        "text_encoder": None,
        "tokenizer": None,
        "transformer": tiny_flux2(),
    }


PIPELINES = {
    "Flux2Pipeline": {},
    "Flux2KleinPipeline": {"negative_prompt_embeds": torch.linspace(-1, 1, 60).view(1, 5, 12), "guidance_scale": 3.0},
}


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("pictures", [0, 2])
def test_a_pipeline_draws_what_the_original_draws_under_the_dense_mask(kind, pictures):
    import diffusers

    pipe = getattr(diffusers, kind)(**{**parts(), "transformer": tiny_flux2()})
    pipe.set_progress_bar_config(disable=True)
    gradient = Image.radial_gradient("L").convert("RGB")
    images = [gradient.resize((72, 64)), gradient.resize((64, 80))][:pictures]
    grid, references = (10, 14), ((16, 18), (20, 16))[:pictures]

    def draw(**extra):
        return pipe(
            image=images or None,
            prompt_embeds=torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1)),
            height=4 * grid[0],
            width=4 * grid[1],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(2),
            output_type="pt",
            **PIPELINES[kind],
            **extra,
        ).images

    dense = draw()
    expected = draw(attention_kwargs={"attention_mask": mask_of(grid, references, 5)})
    assert (dense - expected).abs().max() > 1e-3
    assert flexclear.transform(pipe, r=R, backend="sdpa") is pipe
    assert (draw() - expected).abs().max() <= 1e-4
    assert torch.equal(flexclear.restore(pipe) and draw(), dense)


def test_a_klein_pipeline_fills_a_masked_part_with_the_windowed_transformer():
    from diffusers import Flux2KleinInpaintPipeline

    pipe = Flux2KleinInpaintPipeline(**{**parts(), "transformer": tiny_flux2()}, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)

    def draw(**extra):
        return pipe(
            image=Image.radial_gradient("L").convert("RGB").resize((64, 72)),
            mask_image=Image.linear_gradient("L").resize((64, 72)),
            prompt_embeds=torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(1)),
            height=72,
            width=64,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(2),
            output_type="pt",
            **extra,
        ).images

    dense, seen = draw(), []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(kwargs["img_ids"]), with_kwargs=True
    )
    draw()
    hook.remove()
    grid, *references = flexclear.runtime.grid.read_grids(seen[0])
    expected = draw(attention_kwargs={"attention_mask": mask_of(grid, tuple(references), 5)})
    assert (dense - expected).abs().max() > 1e-3
    flexclear.transform(pipe, r=R, backend="sdpa")
    assert (draw() - expected).abs().max() <= 1e-4


def test_a_pipeline_that_caches_its_pictures_raises_and_works_without_any():
    from diffusers import Flux2KleinKVPipeline

    pipe = Flux2KleinKVPipeline(**{**parts(), "transformer": tiny_flux2()})
    pipe.set_progress_bar_config(disable=True)
    flexclear.transform(pipe, r=R, backend="sdpa")
    settings = {
        "prompt_embeds": torch.ones(1, 5, 12),
        "height": 40,
        "width": 56,
        "num_inference_steps": 2,
        "output_type": "pt",
    }
    assert pipe(**settings).images.shape == (1, 3, 40, 56)
    with pytest.raises(ValueError, match="Flux2KleinPipeline in place of Flux2KleinKVPipeline"):
        pipe(image=Image.radial_gradient("L").convert("RGB").resize((72, 64)), **settings)
