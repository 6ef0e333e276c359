"""What is peculiar to SD3 and SD3.5: patch sizes, skipped layers, fused processors; their pipelines end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import (
    FusedJointAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from PIL import Image

import flexclear
from flexclear.runtime.plan import plans

from contract.oracle import under, windowed
from contract.shapes import Shape
from contract.table import SD35
from helpers import models
from helpers.models import sd3_call, tiny_sd3


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


def masked(model, call, height, width, r):
    """The stock model under the dense boolean mask, in raster order."""
    shape = Shape(height, width, call["encoder_hidden_states"].shape[1])
    with under(SD35, shape, r, all_used=False):  # layers may be skipped
        return run(model, call)


@pytest.mark.parametrize(
    "config", [{"patch_size": 1, "sample_size": 16}, {"patch_size": 4, "pos_embed_max_size": None}]
)
def test_other_patch_sizes_and_interpolated_positions_are_windowed_too(config):
    model = tiny_sd3(**config)
    call = sd3_call(8, 12, 5)
    height, width = (side // config["patch_size"] for side in (16, 24))
    reference = masked(model, call, height, width, 2)
    dense = run(model, call)
    flexclear.transform(model, r=2, backend="sdpa")
    assert (run(model, call) - reference).abs().max() <= 1e-4
    assert (dense - reference).abs().max() > 1e-3


def test_joint_and_image_only_attention_may_have_their_own_radii():
    model = tiny_sd3(**models.SD35)
    call = sd3_call(10, 12, 7)
    flexclear.transform(model, r=3, backend="sdpa")
    both = run(model, call)
    names = [f"transformer_blocks.{block}.attn2" for block in (0, 1)]
    flexclear.transform(model, r={"default": 3, **dict.fromkeys(names)}, backend="sdpa")
    assert (run(model, call) - both).abs().max() > 1e-3
    flexclear.transform(model, r={"default": None, **dict.fromkeys(names)}, backend="sdpa")
    assert (run(model, call) - run(flexclear.restore(model), call)).abs().max() <= 1e-5


@pytest.mark.parametrize("skipped", [[1], [0], [0, 1], [2], [0, 1, 2]])
@pytest.mark.parametrize("residuals", [0, 1, 3])
def test_skipped_layers_and_controlnet_residuals_keep_their_places(skipped, residuals):
    model = tiny_sd3(**models.SD35)
    height, width = 9, 12
    call = sd3_call(height, width, 6) | {"skip_layers": skipped}
    if residuals:
        call["block_controlnet_hidden_states"] = [torch.randn(1, height * width, 32) for _ in range(residuals)]
    reference = masked(model, call, height, width, 3)
    dense = run(model, call)
    flexclear.transform(model, r=3, backend="sdpa")
    assert (run(model, call) - reference).abs().max() <= 1e-4
    assert len(skipped) == 3 or (dense - reference).abs().max() > 1e-3


def test_projections_fused_before_the_transform_equal_the_fused_original_under_the_mask():
    model = tiny_sd3()
    call = sd3_call(12, 10, 16)
    reference = masked(model, call, 12, 10, 3)
    model.fuse_qkv_projections()
    for name in ("to_q", "add_k_proj"):  # what the fused matrices replace
        getattr(model.transformer_blocks[0].attn, name).weight.data.zero_()
    flexclear.transform(model, r=3, backend="sdpa")
    assert (run(model, call) - reference).abs().max() <= 1e-4
    flexclear.restore(model)
    assert {type(p) for p in model.attn_processors.values()} == {FusedJointAttnProcessor2_0}


def test_processors_of_an_earlier_transform_that_unfusing_puts_back_are_not_taken_for_this_one_s():
    model = flexclear.transform(tiny_sd3(), r=3, backend="sdpa")
    call = sd3_call(12, 10, 16)
    model.fuse_qkv_projections()
    radii = {"default": 3, "transformer_blocks.1": 5}
    fused = run(flexclear.transform(model, r=radii, backend="sdpa"), call)
    model.unfuse_qkv_projections()
    with pytest.raises(
        RuntimeError, match=r"transformer_blocks.1.attn of .* was given a WindowedJointAttnProcessor2_0 after"
    ):
        run(model, call)
    assert (run(flexclear.transform(model, r=radii, backend="sdpa"), call) - fused).abs().max() <= 1e-5


BAD_CALLS = {
    "too large": (
        lambda call: call | {"hidden_states": torch.randn(1, 4, 20, 50)},
        r"10 x 25 tokens \(160 x 400 px\).* ends at 24 x 24 tokens \(384 x 384 px; pos_embed_max_size=24\)",
    ),
    "tokens in place of latents": (
        lambda call: call | {"hidden_states": torch.randn(1, 64, 16)},
        r"takes latents of shape \[batch, channels, height, width\] .* got \(1, 64, 16\)",
    ),
    "a side of nothing": (
        lambda call: call | {"hidden_states": torch.randn(1, 4, 1, 8)},
        r"sides of 2 or more, got \(1, 4, 1, 8\)",
    ),
    "no text": (
        lambda call: call | {"encoder_hidden_states": None},
        "needs encoder_hidden_states as a tensor, got None",
    ),
    "a mask": (
        lambda call: call | {"joint_attention_kwargs": {"attention_mask": torch.ones(1, 8)}},
        r"joint_attention_kwargs holds an attention_mask \(Tensor of shape \(1, 8\)\)",
    ),
    "residuals of another size": (
        lambda call: call | {"block_controlnet_hidden_states": [torch.randn(1, 60, 32)]},
        r"block_controlnet_hidden_states of shape \(1, 60, 32\) do not fit latents of 8 x 8 = 64 tokens",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_is_named_before_any_work(change, message):
    model = flexclear.transform(tiny_sd3(), r=2, backend="sdpa")
    plans.clear()
    with pytest.raises(ValueError, match=message):
        run(model, change(sd3_call(8, 8, 4)))
    assert plans.stats().misses == 0


def with_processor(processor):
    model = tiny_sd3()
    model.transformer_blocks[1].attn.set_processor(processor)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: with_processor(SD3IPAdapterJointAttnProcessor2_0(32, 32, 16, 8)),
            TypeError,
            r"transformer_blocks\[1\].attn has SD3's IP-Adapter.*there is no window yet",
        ),
        (
            lambda: with_processor(PAGJointAttnProcessor2_0()),
            TypeError,
            "has a PAGJointAttnProcessor2_0; flexclear replaces",
        ),
        (lambda: tiny_sd3(num_layers=0), ValueError, "has no blocks in transformer_blocks"),
    ],
    ids=["ip-adapter", "pag", "no blocks"],
)
def test_a_model_that_cannot_be_windowed_is_refused_unchanged(make, error, message):
    model = make()
    before = model.attn_processors
    with pytest.raises(error, match=message):
        flexclear.transform(model, r=2)
    assert all(model.attn_processors[name] is processor for name, processor in before.items())
    assert not model._forward_pre_hooks


TEXT_LEN = 77 + 16
VAE = {
    "latent_channels": 16,
    "block_out_channels": (8, 8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "shift_factor": 0.0,
    "scaling_factor": 1.5,
    "mid_block_add_attention": False,
}
"""4 px per latent, 16 channels: those that the inpainting pipeline insists on."""


@pytest.fixture(scope="module")
def pipe():
    """A StableDiffusion3Pipeline of small parts with random weights, and the embedded model's tokenizers."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    embedded = flexclear.embedded.pipeline()
    torch.manual_seed(0)

    def clip(width):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(embedded.tokenizer), hidden_size=width, projection_dim=width, intermediate_size=32,
                num_hidden_layers=2, num_attention_heads=2, bos_token_id=832, eos_token_id=833,
            )
        ).eval()  # fmt: skip

    t5 = T5Config(vocab_size=len(embedded.tokenizer_2), d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformer = tiny_sd3(
        in_channels=16, out_channels=16, joint_attention_dim=48, pooled_projection_dim=40, **models.SD35
    )  # fmt: skip
    made = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**VAE).eval(),
        text_encoder=clip(16),
        tokenizer=embedded.tokenizer,
        text_encoder_2=clip(24),
        tokenizer_2=embedded.tokenizer,
        text_encoder_3=T5EncoderModel(t5).eval(),
        tokenizer_3=embedded.tokenizer_2,
    )
    made.set_progress_bar_config(disable=True)
    return made


def picture(pipe, size=(), **kwargs):
    torch.manual_seed(0)  # the ControlNet pipeline encodes its image without the generator
    return pipe(
        "a red apple on a blue background",
        **dict(zip(("height", "width"), size, strict=False)),
        **{"num_inference_steps": 2, "guidance_scale": 4.0, **kwargs},
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images


def compare(pipe, height, width, size, **kwargs):
    """The pipeline's image against its own under the dense mask, and against the one of the dense model."""
    dense = picture(pipe, size, **kwargs)
    with windowed(SD35, pipe.transformer, Shape(height, width, TEXT_LEN)):
        expected = picture(pipe, size, **kwargs)
    try:
        ours = picture(flexclear.transform(pipe, r=3, backend="sdpa"), size, **kwargs)
    finally:
        flexclear.restore(pipe)
    assert (ours - expected).abs().max() <= 1e-3
    assert (dense - expected).abs().max() > 1e-2, "the window makes no difference here"
    assert torch.equal(picture(pipe, size, **kwargs), dense)


@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14)])
def test_the_pipeline_draws_what_the_original_draws_under_the_dense_mask(pipe, height, width):
    compare(pipe, height, width, (8 * height, 8 * width))


def test_guidance_with_skipped_layers_draws_what_the_original_draws_under_the_dense_mask(pipe):
    extra = {"num_inference_steps": 3, "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    plain = picture(pipe, (72, 96), num_inference_steps=3)
    for layers in ([1], [0]):
        assert (picture(pipe, (72, 96), skip_guidance_layers=layers, **extra) - plain).abs().max() > 1e-2
        compare(pipe, 9, 12, (72, 96), skip_guidance_layers=layers, **extra)


def test_image_to_image_and_inpainting_share_the_windowed_transformer(pipe):
    from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline

    start = Image.radial_gradient("L").resize((96, 72)).convert("RGB")
    extra = {"image": start, "strength": 0.9}
    for kind in (StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline):
        guided = kind(**{name: part for name, part in pipe.components.items() if part is not None})
        guided.set_progress_bar_config(disable=True)
        if kind is StableDiffusion3InpaintPipeline:
            extra["mask_image"] = Image.linear_gradient("L").resize((96, 72))
        compare(guided, 9, 12, (72, 96), **extra)


def test_a_controlnet_pipeline_draws_what_the_original_draws_under_the_dense_mask(pipe):
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    torch.manual_seed(0)
    control = SD3ControlNetModel.from_transformer(
        copy.deepcopy(pipe.transformer), num_layers=2, num_extra_conditioning_channels=0
    )
    for parameter in [*control.controlnet_blocks.parameters(), *control.pos_embed_input.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    guided = StableDiffusion3ControlNetPipeline(**parts, controlnet=control.eval())
    guided.set_progress_bar_config(disable=True)
    compare(
        guided, 9, 12, (72, 96), control_image=Image.radial_gradient("L").resize((96, 72)).convert("RGB")
    )  # fmt: skip
