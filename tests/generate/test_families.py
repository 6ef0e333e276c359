"""``flexclear generate`` with pipelines of other families, small and random, from folders that save_pretrained wrote."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import flexclear
from flexclear import cli
from flexclear.images.files import read_settings

PROMPT = "a red apple on a blue background"


def chroma(embedded, t5):
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    transformer = ChromaTransformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    torch.nn.init.normal_(transformer.distilled_guidance_layer.out_proj.bias)  # gates
    return ChromaPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=embedded.vae,
        text_encoder=t5(12),
        tokenizer=embedded.tokenizer_2,
    )


def sd3(embedded, t5):
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    def clip(width):
        config = CLIPTextConfig(
            vocab_size=len(embedded.tokenizer),
            hidden_size=width,
            projection_dim=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=832,
            eos_token_id=833,
        )
        return CLIPTextModelWithProjection(config)

    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=16,
            in_channels=16,
            out_channels=16,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=32,
            pooled_projection_dim=40,
            pos_embed_max_size=24,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=16,
            shift_factor=0.0,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=clip(16),
        tokenizer=embedded.tokenizer,
        text_encoder_2=clip(24),
        tokenizer_2=embedded.tokenizer,
        text_encoder_3=t5(48),
        tokenizer_3=embedded.tokenizer_2,
    )


MAKE = {"ChromaPipeline": chroma, "StableDiffusion3Pipeline": sd3}


@pytest.fixture(scope="module", params=MAKE)
def folder(request, tmp_path_factory):
    from transformers import T5Config, T5EncoderModel

    embedded = flexclear.embedded.pipeline()
    torch.manual_seed(0)

    def t5(width):
        config = T5Config(
            vocab_size=len(embedded.tokenizer_2), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
        return T5EncoderModel(config)

    folder = tmp_path_factory.mktemp("family") / request.param
    MAKE[request.param](embedded, t5).save_pretrained(folder)
    return folder


def draw(folder, out, *arguments):
    common = ("--prompt", PROMPT, "--text-len", 16, "--device", "cpu", "--backend", "sdpa", "--json", "--out", out)
    done = CliRunner().invoke(cli.app, [str(a) for a in ("generate", folder, *common, *arguments)])
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_pipeline_of_another_family_is_windowed_and_draws_its_sizes(folder, tmp_path):
    pictures = {}
    for r in ("dense", "2"):
        done, lines = draw(folder, tmp_path / r, "--steps", 2, "--r", r, "--size", "64x96", "--size", "72x64")
        assert done.exit_code == 0, done.output
        assert [(line["height"], line["width"]) for line in lines] == [(64, 96), (72, 64)]
        for line in lines:
            settings = read_settings(line["path"])["settings"]
            assert settings["pipeline"] == folder.name
            assert settings["r"] == ("dense" if r == "dense" else 2)
            with Image.open(line["path"]) as picture:
                assert picture.size == (line["width"], line["height"])
                pictures[r, picture.size] = picture.tobytes()
    for size in ((96, 64), (64, 72)):
        assert pictures["dense", size] != pictures["2", size]


# Chroma's own size is 128 latents, too many for a test.
@pytest.mark.parametrize("folder", ["StableDiffusion3Pipeline"], indirect=True)
def test_size_steps_and_guidance_are_the_pipeline_s_own_unless_told(folder, tmp_path):
    done, [line] = draw(folder, tmp_path)
    assert done.exit_code == 0, done.output
    settings = read_settings(line["path"])["settings"]
    assert (line["height"], line["width"], line["steps"]) == (64, 64, 28)
    assert settings["guidance"] == 7.0
    done, [line] = draw(folder, tmp_path, "--guidance", 2)
    assert read_settings(line["path"])["settings"]["guidance"] == 2.0


def test_a_size_that_the_pipeline_does_not_draw_is_refused_by_its_own_rule(folder, tmp_path):
    done, _ = draw(folder, tmp_path, "--size", "64x92")
    assert isinstance(done.exception, ValueError)
    assert f"{folder.name} draws sizes that are multiples of 8 pixels, got 64x92" in str(done.exception)


@pytest.mark.parametrize("folder", ["StableDiffusion3Pipeline", "ChromaPipeline"], indirect=True)
def test_an_image_is_drawn_over_and_away_from_a_prompt_as_diffusers_does(folder, tmp_path):
    import diffusers

    from flexclear.common.foreign import from_pretrained

    photo = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    photo.save(tmp_path / "photo.png")
    asked = ("--image", tmp_path / "photo.png", "--strength", 0.8, "--negative-prompt", "a dog", "--guidance", 3)
    done, [line] = draw(folder, tmp_path / "out", "--steps", 3, "--r", "dense", *asked)
    assert done.exit_code == 0, done.output
    kind = folder.name.replace("Pipeline", "Img2ImgPipeline")
    assert read_settings(line["path"])["settings"]["pipeline"] == kind
    assert (line["height"], line["width"], line["steps"]) == (64, 96, 3 - int(3 - 3 * 0.8))
    pipe = from_pretrained(getattr(diffusers, kind), folder, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "image": photo,
        "strength": 0.8,
        "negative_prompt": "a dog",
        "guidance_scale": 3.0,
        "height": 64,
        "width": 96,
    }
    arguments |= {"num_inference_steps": 3, "max_sequence_length": 16, "generator": torch.Generator().manual_seed(0)}
    with Image.open(line["path"]) as drawn:
        assert drawn.tobytes() == pipe(PROMPT, **arguments).images[0].tobytes()
    done, [line] = draw(folder, tmp_path / "windowed", "--steps", 3, "--r", 2, *asked)
    assert done.exit_code == 0, done.output
