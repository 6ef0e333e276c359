"""``flexclear generate`` from images, negative prompts, ControlNets and LoRA: what is drawn is what diffusers draws."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import flexclear
from flexclear.common.choices import EMBEDDED
from flexclear.generation.calls import call_arguments
from flexclear.generation.kinds import drawing_kind
from flexclear.generation.settings import GenerateSettings
from flexclear.images.files import read_settings

from helpers.generate_calls import APPLE, FAST, FLOWER, ON_CPU, pixels

CALL = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """An image of the size that is drawn, with transparent parts."""
    rows, columns = np.mgrid[:64, :96]
    colours = np.stack([rows * 4, columns * 2, 255 - rows * 2, np.where(columns < 90, 255, 0)], -1).astype(np.uint8)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(colours, "RGBA").save(path)
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of the embedded model, and one of which a layer is not its own."""
    folder, generator = tmp_path_factory.mktemp("lora"), torch.Generator().manual_seed(1)
    weights = {}
    for name, module in flexclear.embedded.pipeline().transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("attn.to_q", "attn.to_v")):
            weights[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator) * 0.3
            weights[f"transformer.{name}.lora_B.weight"] = (
                torch.randn(module.out_features, 2, generator=generator) * 0.3
            )
    save_file(weights, folder / "lora.safetensors")
    more = {name.replace("blocks.0.", "blocks.99."): weight.clone() for name, weight in weights.items()}
    save_file({**weights, **more}, folder / "of_another.safetensors")
    save_file({"transformer.weight": torch.zeros(1)}, folder / "none.safetensors")
    return folder / "lora.safetensors"


def plain(kind=None, **arguments):
    """What diffusers draws by itself; ``kind`` is the pipeline's class."""
    pipe = flexclear.embedded.pipeline()
    parts = dict(pipe.components)
    if "control_image" in arguments:
        parts["controlnet"] = flexclear.embedded.controlnet()
    pipe = pipe if kind is None else kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    seed = arguments.pop("seed", 0)
    drawn = pipe(APPLE, generator=torch.Generator().manual_seed(seed), **{**CALL, **arguments}).images[0]
    return drawn.size, drawn.tobytes()


def white(path):
    picture = Image.open(path)
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def test_an_image_is_drawn_over_by_the_family_s_own_pipeline(generate, photo):
    from diffusers import FluxImg2ImgPipeline

    options = ("--steps", 2, "--text-len", 32, *ON_CPU)
    [line] = generate("--prompt", APPLE, "--r", "dense", "--image", photo, "--strength", 0.5, options=options)
    assert (line["height"], line["width"], line["steps"]) == (64, 96, 1), "the image's size, half of the steps"
    assert pixels(line) == plain(FluxImg2ImgPipeline, image=white(photo), strength=0.5)
    told = read_settings(line["path"])["settings"]
    assert (told["image"], told["strength"], told["pipeline"]) == (str(photo), 0.5, "FluxImg2ImgPipeline")
    [other] = generate("--prompt", APPLE, "--r", "dense", "--image", photo, "--size", "64x64", options=options)
    assert pixels(other)[0] == (64, 64)
    assert "strength" not in read_settings(other["path"])["settings"], "the pipeline's own"


def test_a_control_image_is_followed_by_the_embedded_controlnet(generate, photo):
    from diffusers import FluxControlNetPipeline

    control = ("--control-image", photo, "--controlnet", "embedded", "--control-mode", "blur", "--control-scale", 0.7)
    [line] = generate("--prompt", APPLE, "--r", "dense", *control)
    arguments = {"control_image": white(photo), "control_mode": 1, "controlnet_conditioning_scale": 0.7}
    assert pixels(line) == plain(FluxControlNetPipeline, **arguments)
    [windowed] = generate("--prompt", APPLE, "--r", 4, *control)
    assert pixels(windowed) != pixels(line)
    told = read_settings(line["path"])["settings"]
    assert [told[name] for name in ("controlnet", "control_mode", "control_scale")] == ["embedded", "blur", 0.7]


def test_a_negative_prompt_of_flux_has_a_weight_of_its_own(generate):
    arguments = ("--prompt", APPLE, "--r", "dense", "--negative-prompt", FLOWER, "--true-cfg-scale", 3)
    [line] = generate(*arguments)
    assert pixels(line) == plain(negative_prompt=FLOWER, true_cfg_scale=3.0)
    told = read_settings(line["path"])["settings"]
    assert (told["negative_prompt"], told["true_cfg_scale"], told["guidance"]) == (FLOWER, 3.0, 3.5)


def test_loras_are_fused_with_their_scales(generate, command, lora, tmp_path):
    pictures = {
        name: pixels(generate("--prompt", APPLE, "--r", "dense", *options, out=name)[0])
        for name, options in {
            "none": (),
            "at nought": ("--lora", f"{lora}:0"),
            "whole": ("--lora", lora),
            "twice half": ("--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5"),
        }.items()
    }
    assert pictures["none"] == pictures["at nought"] != pictures["whole"]
    whole, halves = (np.frombuffer(pictures[name][1], np.uint8).astype(int) for name in ("whole", "twice half"))
    assert abs(whole - halves).max() <= 1, "sums in another order"
    pipe = flexclear.embedded.pipeline()
    pipe.load_lora_weights(lora)
    drawn = pipe(APPLE, generator=torch.Generator().manual_seed(0), **CALL).images[0]
    assert abs(whole - np.asarray(drawn).astype(int).reshape(-1)).max() <= 1, "not fused there"
    for name, message in (
        ("of_another", "of_another.safetensors"),
        ("none", "holds no LoRA: no tensor is named so (the first: 'transformer.weight')"),
    ):
        file = lora.with_name(f"{name}.safetensors")
        status, _, error = command("generate", EMBEDDED, *FAST, "--prompt", APPLE, "--lora", file, "--out", tmp_path)
        assert status == 2, error
        assert message in error


def settings(tmp_path, **changed):
    return GenerateSettings(**{"model": EMBEDDED, "prompts": (APPLE,), "out": tmp_path, **changed})


@pytest.mark.parametrize(
    ("own", "changed", "expected"),
    [
        ("FluxPipeline", {}, "FluxPipeline"),
        ("FluxPipeline", {"image": True}, "FluxImg2ImgPipeline"),
        ("FluxPipeline", {"control_image": True, "controlnet": "a/b"}, "FluxControlNetPipeline"),
        ("FluxPipeline", {"control_image": True, "controlnet": "a/b", "image": True}, "FluxControlNetImg2ImgPipeline"),
        ("FluxControlPipeline", {"control_image": True}, "FluxControlPipeline"),
        ("FluxKontextPipeline", {"image": True}, "FluxKontextPipeline"),
        ("Flux2Pipeline", {"image": True}, "Flux2Pipeline"),
        ("StableDiffusion3Pipeline", {"image": True}, "StableDiffusion3Img2ImgPipeline"),
        (
            "StableDiffusion3Pipeline",
            {"control_image": True, "controlnet": "a/b"},
            "StableDiffusion3ControlNetPipeline",
        ),
        ("ChromaPipeline", {"image": True}, "ChromaImg2ImgPipeline"),
        ("QwenImagePipeline", {"image": True}, "QwenImageImg2ImgPipeline"),
        ("QwenImagePipeline", {"control_image": True, "controlnet": "a/b"}, "QwenImageControlNetPipeline"),
        ("QwenImageEditPipeline", {"image": True}, "QwenImageEditPipeline"),
        ("ZImagePipeline", {"image": True}, "ZImageImg2ImgPipeline"),
        ("WanImageToVideoPipeline", {"image": True}, "WanImageToVideoPipeline"),
        ("LTXImageToVideoPipeline", {"image": True}, "LTXImageToVideoPipeline"),
    ],
)
def test_each_family_has_a_pipeline_for_what_is_given(own, changed, expected, photo, tmp_path):
    given = {name: photo if value is True else value for name, value in changed.items()}
    assert drawing_kind(own, settings(tmp_path, **given)).__name__ == expected


@pytest.mark.parametrize(
    ("own", "changed", "message"),
    [
        ("AuraFlowPipeline", {"image": True}, "--image: diffusers has no pipeline from image to image for AuraFlow"),
        ("WanPipeline", {"image": True}, "--image: WanPipeline draws videos from text alone"),
        (
            "FluxKontextPipeline",
            {"image": True, "strength": 0.5},
            "--strength 0.5: FluxKontextPipeline draws all steps",
        ),
        ("WanImageToVideoPipeline", {}, "WanImageToVideoPipeline draws from an image: give --image FILE"),
        ("QwenImageEditPipeline", {}, "QwenImageEditPipeline draws from an image: give --image FILE"),
        ("FluxControlPipeline", {}, "FluxControlPipeline follows an image: give --control-image FILE"),
        ("FluxPipeline", {"control_image": True}, "give --controlnet FOLDER_OR_ID with a FluxControlNetModel"),
        (
            "ChromaPipeline",
            {"control_image": True},
            "--control-image: ChromaPipeline follows none by itself; leave it out",
        ),
        ("ChromaPipeline", {"control_image": True, "controlnet": "a/b"}, "--controlnet: diffusers has none for Chroma"),
        ("FluxControlPipeline", {"control_image": True, "controlnet": "a/b"}, "follows --control-image by itself"),
        (
            "LongCatImageEditPipeline",
            {"image": True, "sizes": ((64, 64),)},
            "--size: LongCatImageEditPipeline takes its",
        ),
        ("NobodysPipeline", {"image": True}, "--image: NobodysPipeline is not a diffusers pipeline"),
    ],
)
def test_what_a_family_has_not_is_refused_by_name(own, changed, message, photo, tmp_path):
    given = {name: photo if value is True else value for name, value in changed.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        drawing_kind(own, settings(tmp_path, **given))


@pytest.mark.parametrize(
    ("own", "changed", "expected"),
    [
        ("FluxPipeline", {"true_cfg_scale": 4.0}, {"negative_prompt": "x", "true_cfg_scale": 4.0}),
        ("FluxPipeline", {}, "FluxPipeline uses it only with --true-cfg-scale above 1, but that is 1;"),
        ("HunyuanVideoPipeline", {}, "uses it only with --true-cfg-scale above 1"),
        ("Flux2Pipeline", {}, "--negative-prompt: Flux2Pipeline has none; leave it out"),
        ("GlmImagePipeline", {}, "--negative-prompt: GlmImagePipeline has none; leave it out"),
        ("StableDiffusion3Pipeline", {}, {"negative_prompt": "x"}),
        ("StableDiffusion3Pipeline", {"guidance": 1.0}, "uses it only with --guidance above 1, but that is 1;"),
        (
            "StableDiffusion3Pipeline",
            {"true_cfg_scale": 4.0},
            "--guidance is the weight of a negative prompt in Stable",
        ),
        ("ZImagePipeline", {"guidance": 1.0}, {"negative_prompt": "x", "guidance_scale": 1.0}),
        ("ZImagePipeline", {"guidance": 0.0}, "uses it only with --guidance above 0, but that is 0;"),
        ("QwenImagePipeline", {}, {"negative_prompt": "x"}),
        ("QwenImagePipeline", {"guidance": 3.0}, {"negative_prompt": "x", "true_cfg_scale": 3.0}),
        ("QwenImage21Pipeline", {"guidance": 3.0}, {"negative_prompt": "x", "true_cfg_scale": 3.0}),
        ("WanPipeline", {}, {"negative_prompt": "x"}),
    ],
)
def test_a_negative_prompt_is_heeded_or_refused(own, changed, expected, tmp_path):
    import diffusers

    asked = settings(tmp_path, negative_prompt="x", **changed)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=re.escape(expected)):
            call_arguments(getattr(diffusers, own), asked)
    else:
        found = call_arguments(getattr(diffusers, own), asked)
        assert {name: found[name] for name in expected} == expected


BAD = {
    "no image": (("--image", "nowhere.png"), "--image: no file nowhere.png"),
    "a folder": (("--control-image", ".", "--controlnet", "embedded"), "--control-image must be the file of an image"),
    "no image file": (("--image", __file__), "cannot be read as an image"),
    "strength alone": (("--strength", 0.5), "--strength needs --image, or the stages of --highres"),
    "strength 0": (("--image", "{photo}", "--strength", 0), "--strength of --image must be more than 0 and at most 1"),
    "controlnet alone": (("--controlnet", "embedded"), "--controlnet embedded needs --control-image"),
    "no mode": (
        ("--control-image", "{photo}", "--controlnet", "embedded"),
        "--control-mode must be from 0 to 2 (grey, blur, tile) for embedded, got None",
    ),
    "another mode": (
        ("--control-image", "{photo}", "--controlnet", "embedded", "--control-mode", "edges"),
        "--control-mode is a number, or of the embedded ControlNet one of ['grey', 'blur', 'tile']; got 'edges'",
    ),
    "no controlnet": (("--control-image", "{photo}", "--controlnet", "./nowhere"), "--controlnet: no folder ./nowhere"),
    "scale alone": (("--true-cfg-scale", 2), "--true-cfg-scale weighs --negative-prompt against the prompt"),
    "no LoRA": (("--lora", "nowhere.safetensors:0.5"), "--lora nowhere.safetensors:0.5: no file nowhere.safetensors"),
    "a LoRA's scale": (("--lora", f"{__file__}:nan"), "got the scale 'nan'"),
    "highres": (("--highres", "64,128", "--batch", 2), "--highres enlarges one image at a time"),
    "highres control": (
        ("--highres", "64,128", "--control-image", "{photo}"),
        "--highres enlarges without a ControlNet",
    ),
    "highres negative": (("--highres", "64,128", "--negative-prompt", "x"), "--highres has no negative prompt"),
    "highres tiles": (("--highres", "64,128", "--vae-tiling"), "--highres encodes and decodes in tiles by itself"),
    "offload on a CPU": (("--offload", "group", "--device", "cpu"), "--device is 'cpu', where they are anyway"),
    "offload and compile": (("--offload", "sequential", "--compile"), "give --offload group or model with --compile"),
    "an unknown offload": (("--offload", "disk"), "--offload must be one of ['model', 'sequential', 'group']"),
    "an image's size": (("--image", "{odd}"), "multiples of 8 pixels, got 30x30; near it: 32x32"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_what_makes_no_sense_is_named_before_weights_are_read(
    command, tmp_path, monkeypatch, photo, arguments, message
):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *a, **b: pytest.fail("weights were read"))
    Image.new("RGB", (30, 30)).save(tmp_path / "odd.png")
    given = [str(argument).format(photo=photo, odd=tmp_path / "odd.png") for argument in arguments]
    status, output, error = command("generate", "embedded", "--prompt", APPLE, *given, "--out", tmp_path / "out")
    assert (status, output) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_lora_needs_peft_and_says_so(command, tmp_path, monkeypatch, lora):
    monkeypatch.setattr("flexclear.common.extras.is_installed", lambda module: module != "peft")
    status, _, error = command("generate", "embedded", "--prompt", APPLE, "--lora", lora, "--out", tmp_path / "out")
    assert status == 2
    assert "flexclear generate --lora needs peft: pip install peft (flexclear's extra train has it)" in error


def test_an_image_that_was_replaced_is_of_another_set(generate, command, tmp_path, photo):
    place = tmp_path / "photo.png"
    place.write_bytes(photo.read_bytes())
    arguments = ("--prompt", APPLE, "--image", place, "--strength", 0.5, "--r", 4)
    [line] = generate(*arguments)
    assert generate(*arguments, "--resume") == []
    Image.new("RGB", (96, 64), "red").save(place)
    status, _, error = command("generate", "embedded", *FAST, *arguments, "--resume", "--out", tmp_path / "out")
    assert status == 2
    assert "is not of this set (settings.fingerprints" in error
    assert json.loads(json.dumps(line))["batch"] == 1
