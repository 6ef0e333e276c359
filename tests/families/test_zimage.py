"""What is peculiar to Z-Image: two refiners, offloading, the end of its positions; its pipelines end to end."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from PIL import Image

import flexclear
from flexclear.masks import Disc, Layout, dense_mask

from helpers.models import padded, tiny_zimage, zimage_call

CPU = torch.device("cpu")
R = 3
TEXT = 12


@pytest.fixture
def model():
    return tiny_zimage()


class Masked(ZSingleStreamAttnProcessor):
    """Z-Image's own attention with a dense mask, which its blocks have no way to be given."""

    def __init__(self, mask, refiner):
        super().__init__()
        self.mask, self.refiner = mask, refiner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        if attention_mask is None:
            mask = self.mask[None, None]
        elif self.refiner:
            mask = attention_mask  # the ControlNet calls the refiner, and it is not what is transformed
        else:
            mask = self.mask & attention_mask[:, None, None, :]
        return super().__call__(attn, hidden_states, attention_mask=mask, freqs_cis=freqs_cis)


def masked(model, height, width, captions, r=R):
    """A copy of the stock model whose attention is under the dense masks, in raster order."""
    model = copy.deepcopy(model)
    image_len = height * width
    pads = padded(image_len) - image_len
    for stack, text_len in (
        (model.noise_refiner, pads),
        (model.layers, pads + max(padded(length) for length in captions)),
    ):
        mask = dense_mask(Layout(height, width, text_len, text_first=False, order="raster"), Disc(r))
        for block in stack:
            block.attention.set_processor(Masked(mask, stack is model.noise_refiner))
    return model


def run(model, call, **kwargs):
    with torch.no_grad():
        return torch.stack(model(**call, **kwargs).sample)


def test_the_refiner_alone_and_the_layers_alone_can_be_windowed(model):
    call = zimage_call(9, 13, (20,))
    windowed = masked(model, 9, 13, (20,))
    for key, stack in (("noise_refiner", "layers"), ("layers", "noise_refiner")):
        expected = copy.deepcopy(windowed)
        for block in getattr(expected, stack):
            block.attention.set_processor(ZSingleStreamAttnProcessor())
        ours = flexclear.transform(copy.deepcopy(model), r={key: R, "default": None}, backend="sdpa")
        assert (run(ours, call) - run(expected, call)).abs().max() <= 1e-4


def test_the_captions_own_refiner_is_left_alone(model):
    before = [block.attention.processor for block in model.context_refiner]
    flexclear.transform(model, r=R)
    assert [block.attention.processor for block in model.context_refiner] == before


def test_checkpointing_that_loses_the_plan_is_refused_with_the_reason(model):
    flexclear.transform(model, r=R)
    model.train().enable_gradient_checkpointing()
    with torch.autograd.graph.save_on_cpu():
        loss = torch.stack(model(**zimage_call(9, 13, (20,))).sample).sum()
        with pytest.raises(ValueError, match=r"called without its window.*use_reentrant"):
            loss.backward()


def test_a_block_s_embedding_may_have_another_type_than_the_latents(model):
    call = zimage_call(9, 13, (20,))
    model.to(torch.bfloat16).t_embedder.to(torch.float32)
    call = {**call, "x": [x.bfloat16() for x in call["x"]], "cap_feats": [c.bfloat16() for c in call["cap_feats"]]}
    reference = run(masked(model, 9, 13, (20,)), call).float()
    ours = run(flexclear.transform(model, r=R, backend="sdpa"), call).float()
    assert (ours - reference).norm() / reference.norm() <= 2e-2


@pytest.mark.parametrize("offload_first", [True, False])
def test_hooks_that_move_a_call_s_arguments_move_the_timestep_with_its_plan(model, offload_first):
    accelerate = pytest.importorskip("accelerate")
    call = zimage_call(9, 13, (33, 7))
    expected = run(flexclear.transform(copy.deepcopy(model), r=R, backend="sdpa"), call)
    if offload_first:
        accelerate.cpu_offload(model, execution_device=CPU)
    flexclear.transform(model, r=R, backend="sdpa")
    if not offload_first:
        accelerate.cpu_offload(model, execution_device=CPU)
    assert torch.equal(run(model, call), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": [[torch.randn(4, 1, 8, 8)]]}, "nested lists in x: the Omni mode"),
        ({"siglip_feats": [[torch.randn(4, 4, 8)]]}, "siglip_feats: the Omni mode"),
        ({"image_noise_mask": [[1]]}, "image_noise_mask: the Omni mode"),
        ({"f_patch_size": 2}, "f_patch_size=2: windows are made for patches of one frame"),
        ({"patch_size": 4}, "patch_size=4: this ZImageTransformer2DModel has 2"),
        ({"x": [torch.randn(4, 2, 8, 8)]}, r"one frame\), got \(4, 2, 8, 8\)"),
        ({"x": [torch.randn(4, 1, 8, 9)]}, "8 x 9 do not divide into patches of 2 x 2"),
        ({"x": [torch.randn(4, 1, 8, 130)]}, "4 x 65 tokens behind a caption of 32 is too large.*end at 64 x 64"),
        ({"cap_feats": [torch.randn(193, TEXT)]}, "caption of 224 is too large.*a caption of 198"),
        ({"x": None}, "needs x as a list of latents, got None"),
        ({"x": []}, "needs x as a list of latents"),
        ({"cap_feats": [torch.randn(1, 3, TEXT)]}, r"needs cap_feats as a list of tensors \[tokens, channels\]"),
        ({"cap_feats": [torch.randn(3, TEXT)] * 2}, "x holds 1 images, cap_feats 2 captions"),
        ({"t": 0.5}, "needs t as a tensor, got 0.5"),
        (
            {"x": [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 12)], "cap_feats": [torch.randn(3, TEXT)] * 2},
            r"must have one shape.*\(4, 1, 8, 8\), \(4, 1, 8, 12\)",
        ),
    ],
)
def test_what_cannot_be_windowed_is_refused_with_the_reason(model, changes, message):
    flexclear.transform(model, r=R, backend="sdpa")
    with pytest.raises(ValueError, match=message):
        run(model, {**zimage_call(4, 4, (3,)), **changes})


def test_the_longest_caption_that_the_positions_allow_works(model):
    call = zimage_call(4, 4, (192,))
    reference = run(masked(model, 4, 4, (192,)), call)
    assert (run(flexclear.transform(model, r=R, backend="sdpa"), call) - reference).abs().max() <= 1e-4


PX = 8  # pixels per token with the embedded VAE
WORDS = "a red apple on a blue background "


@pytest.fixture(scope="module")
def parts():
    """The embedded pipeline's VAE, scheduler and tokenizer, and a random Qwen3 as text encoder."""
    from transformers import Qwen3Config, Qwen3Model

    base = flexclear.embedded.pipeline()
    base.tokenizer_2.chat_template = "{{ messages[0]['content'] }}"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(base.tokenizer_2),
        hidden_size=TEXT,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    return {
        "vae": base.vae,
        "scheduler": base.scheduler,
        "tokenizer": base.tokenizer_2,
        "text_encoder": Qwen3Model(config).eval(),
    }


def pipeline(parts, kind, transformer, **more):
    import diffusers

    pipe = getattr(diffusers, kind)(**parts, transformer=transformer, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, height, width, **kwargs):
    return pipe(
        5 * WORDS,  # longer than 32 tokens, so that the empty negative prompt is padded to another length
        height=height,
        width=width,
        num_inference_steps=2,
        guidance_scale=2.0,
        max_sequence_length=64,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **kwargs,
    ).images


def assert_draws_the_same(parts, kind, height=9 * PX, width=13 * PX, *, more=None, **kwargs):
    """The transformed pipeline draws what a pipeline of the stock model under the dense mask draws."""
    model = tiny_zimage(in_channels=8)
    pipe = pipeline(parts, kind, model, **(more or {}))
    captions = [len(embeds[0]) for embeds in pipe.encode_prompt(5 * WORDS, "cpu", max_sequence_length=64)]
    assert [padded(length) for length in captions] == [64, 32]
    dense = draw(pipe, height, width, **kwargs)
    stock = pipeline(parts, kind, masked(model, height // PX, width // PX, captions), **copy.deepcopy(more or {}))
    expected = draw(stock, height, width, **kwargs)
    assert flexclear.transform(pipe, r=R, backend="sdpa") is pipe
    if more:
        pipe = pipeline(parts, kind, model, **more)
    assert (draw(pipe, height, width, **kwargs) - expected).abs().max() <= 1e-3
    assert (dense - expected).abs().max() > 1e-2
    assert torch.equal(draw(flexclear.restore(pipe), height, width, **kwargs), dense)


@pytest.mark.parametrize(("height", "width"), [(96, 128), (72, 104)])
def test_the_pipeline_draws_what_the_original_draws_under_the_dense_mask(parts, height, width):
    assert_draws_the_same(parts, "ZImagePipeline", height, width)


@pytest.mark.parametrize("kind", ["ZImageImg2ImgPipeline", "ZImageInpaintPipeline"])
def test_image_guided_pipelines_are_windowed(parts, kind):
    extra = {"image": Image.radial_gradient("L").resize((104, 72)).convert("RGB"), "strength": 1.0}
    if kind == "ZImageInpaintPipeline":
        extra["mask_image"] = Image.linear_gradient("L").resize((104, 72))
    assert_draws_the_same(parts, kind, **extra)


@pytest.mark.parametrize("refiner", [None, "control_noise_refiner"])
@pytest.mark.parametrize("kind", ["ZImageControlNetPipeline", "ZImageControlNetInpaintPipeline"])
def test_the_controlnet_shares_the_refiner_and_stays_what_it_was(parts, kind, refiner):
    from diffusers import ZImageControlNetModel

    torch.manual_seed(0)
    control = ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=8 if kind == "ZImageControlNetPipeline" else 17,
        add_control_noise_refiner=refiner,
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    ).eval()
    for name, parameter in control.named_parameters():
        if "before_proj" in name or "after_proj" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    extra = {"control_image": Image.radial_gradient("L").resize((104, 72)).convert("RGB")}
    if kind == "ZImageControlNetInpaintPipeline":
        extra |= {
            "image": extra["control_image"].rotate(90),
            "mask_image": Image.linear_gradient("L").resize((104, 72)),
        }
    assert_draws_the_same(parts, kind, more={"controlnet": control}, **extra)


def test_all_steps_and_both_guidance_calls_share_one_plan(parts):
    from flexclear.runtime.plan import plans

    pipe = flexclear.transform(pipeline(parts, "ZImagePipeline", tiny_zimage(in_channels=8)), r=R, backend="sdpa")
    plans.clear()
    draw(pipe, 72, 104)
    assert (plans.stats().misses, plans.stats().hits) == (2, 2)  # of the refiner and of the layers, in two steps
