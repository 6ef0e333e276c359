"""What is peculiar to Qwen-Image: sizes in place of ids, layers, references modulated apart; its pipelines end to end."""

from __future__ import annotations

import contextlib
import functools
import inspect
from unittest import mock

import pytest
import torch
from PIL import Image

import flexclear

from contract.oracle import expected, under, windowed
from contract.shapes import Shape
from contract.table import QWEN
from helpers.models import qwen_call, tiny_qwen

pytestmark = pytest.mark.filterwarnings("ignore:flexclear. a reference image")
R = 3


def run(model, call, **extra):
    with torch.no_grad():
        return model(**call, **extra).sample


def masked(model, call):
    """The stock model under the dense boolean mask, in raster order."""
    (height, width), *references = ((h, w) for _, h, w in call["img_shapes"][0])
    shape = Shape(height, width, call["encoder_hidden_states"].shape[1], references=tuple(references))
    return expected(QWEN, model, shape, call)


@pytest.fixture
def model():
    return tiny_qwen()


PADDING = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 0, 0, 0, 0]])


def test_a_text_that_is_all_there_costs_no_mask_of_its_own(model):
    from flexclear.runtime.grid import GridReader

    call = qwen_call((8, 10), (), 9, 2, mask=torch.ones(2, 9, dtype=torch.int64))
    family = flexclear.families.family_of(model)
    assert family.read(model, call, GridReader()).keep == {}
    assert list(family.read(model, {**call, "encoder_hidden_states_mask": PADDING}, GridReader()).keep) == ["joint"]


def test_one_grid_per_sample_may_come_without_a_list_around_it(model):
    call = qwen_call((9, 7), (), 6, batch=2)
    flexclear.transform(model, r=R, backend="sdpa")
    nested = run(model, call)
    assert torch.equal(run(model, {**call, "img_shapes": [(1, 9, 7)] * 2}), nested)
    assert torch.equal(run(model, {**call, "img_shapes": [[(1, 9, 7)]]}), nested)


def test_references_are_modulated_as_such_where_the_model_tells_them_apart():
    model = tiny_qwen(zero_cond_t=True)
    call = qwen_call((9, 13), ((8, 12), (5, 9)), 7, 2)
    reference = masked(model, call)
    alike = masked(tiny_qwen(), call)
    assert (reference - alike).abs().max() > 1e-3, "zero_cond_t makes no difference here"
    flexclear.transform(model, r=R, backend="sdpa")
    assert (run(model, call) - reference).abs().max() <= 1e-4


def test_layers_of_a_layered_model_are_further_grids():
    model = tiny_qwen(use_layer3d_rope=True, use_additional_t_cond=True)
    call = qwen_call((9, 11), ((9, 11), (9, 11), (9, 11)), 7, 2) | {"additional_t_cond": torch.tensor([0, 1])}
    reference = masked(model, call)
    assert (run(model, call) - reference).abs().max() > 1e-3
    flexclear.transform(model, r=R, backend="sdpa")
    assert (run(model, call) - reference).abs().max() <= 1e-4


@pytest.mark.parametrize("layered", [False, True])
def test_an_ntk_factor_is_a_larger_base_of_the_rotary_frequencies(layered):
    model = tiny_qwen(use_layer3d_rope=layered)
    call = qwen_call((8, 12), ((5, 9),), 7)
    larger = tiny_qwen(use_layer3d_rope=layered)
    larger.pos_embed = type(larger.pos_embed)(100000, [4, 6, 6], scale_rope=True)
    reference = masked(larger, call)
    assert (masked(model, call) - reference).abs().max() > 1e-3
    flexclear.transform(model, r=R, backend="sdpa", ntk_factor=10)
    assert (run(model, call) - reference).abs().max() <= 1e-4
    with flexclear.override(ntk_factor=1):
        assert (run(model, call) - reference).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_shapes": None}, "img_shapes must be a list with one entry per sample"),
        ({"img_shapes": [[(6, 8)]]}, "img_shapes must be a list with one entry per sample"),
        ({"img_shapes": []}, "img_shapes must be a list with one entry per sample"),
        ({"img_shapes": [[(1, 6, 8)], [(1, 8, 6)]]}, "img_shapes has samples of different sizes"),
        ({"img_shapes": [[(2, 6, 4)]] * 2}, r"several frames; windows are defined on single images, frames = 1"),
        ({"img_shapes": [[(1, 6, 9)]] * 2}, r"do not hold the 6 x 9 = 54 image tokens that img_shapes describes"),
        ({"encoder_hidden_states": None}, "needs encoder_hidden_states as a tensor"),
        (
            {"encoder_hidden_states_mask": torch.ones(2, 4)},
            r"of shape \(2, 5\) \(batch, text tokens\), got shape \(2, 4\)",
        ),
        ({"encoder_hidden_states_mask": [[True] * 5] * 2}, r"encoder_hidden_states_mask must be a tensor .*got \[\["),
        ({"attention_kwargs": {"attention_mask": torch.ones(1)}}, "attention_kwargs holds an attention_mask"),
    ],
)
def test_a_bad_call_is_named(model, change, message):
    call = qwen_call((6, 8), (), 5, 2)
    flexclear.transform(model, r=R, backend="sdpa")
    with pytest.raises(ValueError, match=message):
        run(model, {**call, **change})


def tiny_vae(channels=3, latents=4):
    """An AutoencoderKLQwenImage; one token of the transformer covers 4 x 4 px."""
    from diffusers import AutoencoderKLQwenImage

    torch.manual_seed(1)
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=latents,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        input_channels=channels,
        latents_mean=[0.0] * latents,
        latents_std=[1.0] * latents,
    ).eval()


def pipeline(kind, **parts):
    """A real pipeline of small parts; prompts come as embeddings, so that it needs no text encoder."""
    import diffusers

    pipe = getattr(diffusers, kind)(
        **{
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
            "vae": tiny_vae(),
            "text_encoder": None,
            "tokenizer": None,
            "transformer": tiny_qwen(),
            **parts,
        }
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **extra):
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(4)  # some pipelines sample from the autoencoder without the generator
    return pipe(
        **{
            "prompt_embeds": torch.randn(1, 9, 12, generator=generator),
            "prompt_embeds_mask": PADDING[:1],
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(2),
            "output_type": "pt",
            **extra,
        }
    ).images


def check_pipeline(pipe, grid, references=(), texts=(9,), **extra):
    """Transformed, ``pipe`` draws what it draws originally under the dense mask, and that is another image."""
    dense = draw(pipe, **extra)
    with contextlib.ExitStack() as stack:
        for text_len in texts:
            stack.enter_context(under(QWEN, Shape(*grid, text_len, references=tuple(references))))
        masked = draw(pipe, **extra)
    stacked = [torch.stack(images) if isinstance(images, list) else images for images in (dense, masked)]
    assert (stacked[0] - stacked[1]).abs().max() > 1e-3, "the window makes no difference here"
    assert flexclear.transform(pipe, r=R, backend="sdpa") is pipe
    ours = draw(pipe, **extra)
    ours = torch.stack(ours) if isinstance(ours, list) else ours
    assert (ours - stacked[1]).abs().max() <= 1e-4


GRADIENT = Image.radial_gradient("L").convert("RGB")


def test_the_text_to_image_pipeline_draws_what_the_original_draws_under_the_dense_mask():
    negative = {"negative_prompt_embeds": torch.ones(1, 4, 12), "negative_prompt_embeds_mask": torch.ones(1, 4)}
    guided = {**negative, "true_cfg_scale": 3.0}
    check_pipeline(pipeline("QwenImagePipeline"), (10, 14), texts=(9, 4), height=40, width=56, **guided)


def test_several_pictures_of_several_padded_prompts_are_windowed():
    prompts = {"prompt_embeds": torch.randn(2, 9, 12), "prompt_embeds_mask": PADDING, "num_images_per_prompt": 2}
    check_pipeline(pipeline("QwenImagePipeline"), (9, 7), height=36, width=28, **prompts)


def test_image_to_image_and_inpainting_pipelines_are_windowed():
    extra = {"image": GRADIENT.resize((56, 40)), "height": 40, "width": 56, "strength": 0.9, "num_inference_steps": 3}
    check_pipeline(pipeline("QwenImageImg2ImgPipeline"), (10, 14), **extra)
    extra["mask_image"] = Image.linear_gradient("L").resize((56, 40))
    check_pipeline(pipeline("QwenImageInpaintPipeline"), (10, 14), **extra)


@pytest.mark.parametrize("inpaints", [False, True])
def test_a_controlnet_s_residuals_follow_the_token_order_in_its_pipeline(inpaints):
    from diffusers import QwenImageControlNetModel

    transformer = tiny_qwen()
    config = {**transformer.config, "num_layers": 1, "extra_condition_channels": 4 if inpaints else 0}
    control = QwenImageControlNetModel.from_config(config).eval()
    for parameter in [*control.controlnet_blocks.parameters(), *control.controlnet_x_embedder.parameters()]:
        torch.nn.init.normal_(parameter, std=0.2)
    kind = "QwenImageControlNetInpaintPipeline" if inpaints else "QwenImageControlNetPipeline"
    pipe = pipeline(kind, transformer=transformer, controlnet=control)
    extra = {"control_image": GRADIENT.resize((56, 40)), "height": 40, "width": 56}
    if inpaints:
        extra["control_mask"] = Image.linear_gradient("L").resize((56, 40))
    weak, strong = (draw(pipe, controlnet_conditioning_scale=scale, **extra) for scale in (0.0, 1.0))
    assert (weak - strong).abs().max() > 1e-3, "the ControlNet makes no difference here"
    # Not around the pipeline: the ControlNet has attention of its own, which stays dense.
    with windowed(QWEN, transformer, Shape(10, 14, 9)):
        masked = draw(pipe, **extra)
    assert (strong - masked).abs().max() > 1e-3, "the window makes no difference here"
    flexclear.transform(pipe, r=R, backend="sdpa")
    assert (draw(pipe, **extra) - masked).abs().max() <= 1e-4


@contextlib.contextmanager
def small_pictures(kind):
    """The size that a pipeline brings its images to, 1024 x 1024 px or as many in another ratio, is 128 x 128 px."""
    import diffusers

    module = inspect.getmodule(getattr(diffusers, kind))
    plain = module.calculate_dimensions
    with mock.patch.object(module, "calculate_dimensions", lambda area, ratio: plain(area / 64, ratio)):
        yield


@pytest.mark.parametrize(("kind", "pictures"), [("QwenImageEditPipeline", 1), ("QwenImageEditPlusPipeline", 2)])
def test_editing_pipelines_see_their_pictures_through_the_window(kind, pictures):
    images, references = [GRADIENT, GRADIENT.resize((256, 64))][:pictures], [(32, 32), (16, 64)][:pictures]
    with small_pictures(kind):
        image = images if pictures > 1 else images[0]
        check_pipeline(pipeline(kind, processor=None), (9, 13), references, image=image, height=36, width=52)


def test_filling_a_masked_part_of_a_picture_sees_it_through_the_window():
    kind = "QwenImageEditInpaintPipeline"
    extra = {"mask_image": Image.linear_gradient("L"), "strength": 0.9, "num_inference_steps": 3}
    with small_pictures(kind):
        check_pipeline(pipeline(kind, processor=None), (32, 32), [(32, 32)], image=GRADIENT, **extra)


@functools.cache
def tiny_text_encoder():
    """The smallest Qwen2.5-VL there is room for; prompts come as embeddings, so that only its type matters."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def test_the_layered_pipeline_sees_all_its_layers_through_the_window():
    kind = "QwenImageLayeredPipeline"
    config = {"use_layer3d_rope": True, "use_additional_t_cond": True, "in_channels": 24, "out_channels": 6}
    pipe = pipeline(
        kind,
        transformer=tiny_qwen(**config),
        vae=tiny_vae(channels=4, latents=6),
        text_encoder=tiny_text_encoder(),
        processor=None,
    )
    extra = {"image": GRADIENT.convert("RGBA"), "prompt": "layers", "layers": 2, "resolution": 640}
    with small_pictures(kind):
        check_pipeline(pipe, (16, 16), [(16, 16)] * 3, **extra)
