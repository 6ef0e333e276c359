"""Workflows on ComfyUI's own executor.

The embedded model is loaded by test nodes: ComfyUI's loader takes FLUX's sizes from tables, and the embedded model has others.
Its transformer is still ComfyUI's, with the same weights.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import flexclear
from flexclear import embedded

from helpers.comfyui_engine import FOLDER, NODE, ROOT, backend, load

EMBEDDED = ROOT / "tests" / "comfyui" / "embedded.json"
SHIPPED = sorted((NODE / "workflows").glob("*.json"))
EXTRA = ("custom_sampler", "flux", "hunyuan", "model_advanced", "sd3", "video")


@functools.cache
def pipeline():
    """The embedded model as a diffusers pipeline."""
    pipe = embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def converted():
    """The embedded model's transformer in ComfyUI: its ``ModelPatcher``."""
    import comfy.latent_formats
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.utils import flux_to_diffusers

    pipe = pipeline()
    its, vae = pipe.transformer.config, pipe.vae.config
    heads, hidden = its.num_attention_heads, its.num_attention_heads * its.attention_head_dim
    sizes = {"hidden_size": hidden, "depth": its.num_layers, "depth_single_blocks": its.num_single_layers}
    channels = its.in_channels // 4
    settings = {
        "image_model": "flux",
        **sizes,
        **dict.fromkeys(("in_channels", "out_channels"), channels),
        "vec_in_dim": its.pooled_projection_dim,
        "context_in_dim": its.joint_attention_dim,
        "num_heads": heads,
        "axes_dim": list(its.axes_dims_rope),
        "guidance_embed": its.guidance_embeds,
        "mlp_ratio": 4.0,
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "txt_ids_dims": [],
    }
    config = comfy.supported_models.Flux(settings)
    config.set_inference_dtype(torch.float32, None)
    config.latent_format = comfy.latent_formats.Flux()
    config.latent_format.latent_channels = channels
    config.latent_format.scale_factor, config.latent_format.shift_factor = vae.scaling_factor, vae.shift_factor
    cpu = torch.device("cpu")
    base = config.get_model({}, "", device=cpu)
    own = {name: torch.full_like(weight, torch.nan) for name, weight in base.diffusion_model.state_dict().items()}
    given = pipe.transformer.state_dict()
    for name, place in flux_to_diffusers(sizes, output_prefix="").items():
        if name not in given:
            continue
        target, rows, change = (*((place,) if isinstance(place, str) else place), None, None)[:3]
        weight = given[name] if change is None else change(given[name])
        (own[target] if rows is None else own[target].narrow(*rows)).copy_(weight)
    assert not any(weight.isnan().any() for weight in own.values()), "a weight was not converted"
    base.diffusion_model.load_state_dict(own)
    return comfy.model_patcher.ModelPatcher(base, cpu, cpu)


class EmbeddedModel:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "get", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def get(self):
        return (converted(),)


class EmbeddedText:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "get", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def get(self, text):
        tokens, pooled, _ = pipeline().encode_prompt(text, text, "cpu")
        return ([[tokens, {"pooled_output": pooled}]],)


class EmbeddedLatent:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "get", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": ("INT", {}), "height": ("INT", {})}}

    def get(self, width, height):
        shape = 1, pipeline().vae.config.latent_channels, height // 4, width // 4
        return ({"samples": torch.zeros(shape)},)


class EmbeddedDecode:
    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "get", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def get(self, samples):
        image = pipeline().vae.decode(samples["samples"]).sample
        return ((image / 2 + 0.5).clamp(0, 1).movedim(1, -1),)


@functools.cache
def with_extra_nodes():
    """ComfyUI's nodes by name, including those in extra files that the workflows use, and the test nodes."""
    import nodes

    names = load()
    for file in EXTRA:
        path = FOLDER / "ComfyUI" / "comfy_extras" / f"nodes_{file}.py"
        assert asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras")), file
    for own in (EmbeddedModel, EmbeddedText, EmbeddedLatent, EmbeddedDecode):
        names[own.__name__] = own
    return names


def execute(prompt: dict, folder: str) -> tuple[bool, list, float]:
    """Check a workflow and run it as ComfyUI's server does: whether it succeeded, its messages, and seconds."""
    import execution
    import folder_paths

    with_extra_nodes()
    folder_paths.set_output_directory(folder)
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("test", prompt, None))
    if not valid:
        return False, [error, errors], 0.0
    server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *_: None)
    sizes = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    executor = execution.PromptExecutor(server, cache_type=execution.CacheType.CLASSIC, cache_args=sizes)
    began = time.perf_counter()
    executor.execute(prompt, "test", {}, outputs)
    return executor.success, executor.status_messages, time.perf_counter() - began


def embedded_workflow(text: str, steps: int, seed: int, size: tuple[int, int], levels) -> dict:
    """The workflow with these inputs; ``levels`` are diffusers' noise levels."""
    prompt = json.loads(EMBEDDED.read_text(encoding="utf-8"))
    prompt["3"]["inputs"]["text"] = text
    prompt["4"]["inputs"].update(height=size[0], width=size[1])
    prompt["7"]["inputs"]["sigmas"] = ", ".join(f"{level:.9f}" for level in levels)
    prompt["8"]["inputs"]["noise_seed"] = seed
    return prompt


def pictures(folder: str, by: str, steps: int = 4, size: tuple[int, int] = (128, 96)) -> dict:
    """A picture by ComfyUI and by diffusers, windowed and dense.

    Args:
        folder: where ComfyUI saves its own.
        by: ``"flex"`` or ``"sdpa"``, for both.
        steps, size: number of steps, and size of the picture.
    """
    pipe, text, seed = pipeline(), "a red apple on a blue background", 3
    found: dict = {}
    for kind in ("windowed", "dense"):
        if kind == "windowed":
            flexclear.transform(pipe, r=4, backend=by)
        else:
            flexclear.restore(pipe)
        draw = torch.Generator().manual_seed(seed)
        drawn = pipe(text, height=size[0], width=size[1], num_inference_steps=steps, generator=draw, output_type="np")
        prompt = copy.deepcopy(embedded_workflow(text, steps, seed, size, pipe.scheduler.sigmas.tolist()))
        prompt["11"]["inputs"]["filename_prefix"] = kind
        if kind == "dense":
            prompt["5"]["inputs"]["model"] = ["1", 0]
            del prompt["2"]
        with backend(by):
            succeeded, messages, seconds = execute(prompt, folder)
        if not succeeded:
            return {"failed": str(messages)}
        (path,) = Path(folder).glob(f"{kind}_*.png")
        saved = np.asarray(Image.open(path)).astype(int)
        expected = np.clip(255.0 * drawn.images[0], 0, 255).astype(np.uint8).astype(int)
        found[kind] = {"saved": saved, "expected": expected, "seconds": seconds, "messages": [m[0] for m in messages]}
    return found


def checked(path: str, folder: str) -> tuple[bool, str]:
    """Whether ComfyUI accepts a shipped workflow unchanged, given (empty) files with the names in it."""
    import execution
    import folder_paths

    with_extra_nodes()
    kinds = {"unet_name": "diffusion_models", "clip_name": "text_encoders", "vae_name": "vae"}
    prompt = json.loads(Path(path).read_text(encoding="utf-8"))
    for node in prompt.values():
        for name, value in node["inputs"].items():
            kind = kinds.get(name.rstrip("12"))
            if kind is not None:
                place = Path(folder) / kind
                place.mkdir(exist_ok=True)
                (place / value).touch()
                folder_paths.add_model_folder_path(kind, os.fspath(place))
    valid, error, _, errors = asyncio.run(execution.validate_prompt("test", prompt, None))
    return valid, f"{error} {errors}"
