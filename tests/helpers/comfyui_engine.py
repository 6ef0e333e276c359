"""ComfyUI's own engine on the CPU, in a separate process, with small random models.

ComfyUI is under GPL-3.0 and not a dependency: ``make comfyui`` downloads it into ``.venv/comfyui``, only for tests and
benchmarks. It changes settings of torch and has modules named ``utils`` and ``server``, so the test process never imports it:
functions that need it run in ``engine()``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.machinery
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv" / "comfyui"
NODE = ROOT / "comfyui"

TOLERANCE = 2.0**-17
"""Allowed difference, relative to the largest output, as for diffusers models (``contract/oracle.py``)."""

MATTERS = 2.0**-10
"""Least difference, relative to the largest output, of anything that must matter."""


def engine() -> ProcessPoolExecutor:
    """A process in which ComfyUI runs. Submitted functions must be defined at module level."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=start)


def start() -> None:
    """Make ComfyUI importable in this process: on the CPU, and without torchvision, which nothing here uses."""
    sys.path[:0] = [str(FOLDER / "ComfyUI"), str(FOLDER / "site")]
    sys.argv = ["comfyui"]
    from transformers.utils import import_utils

    # These results are cached: otherwise transformers would take the stand-in below for the real torchvision.
    import_utils.is_torchvision_available(), import_utils.is_torchvision_v2_available()
    for package in ("torchvision", "torchaudio"):
        for part in ("", ".transforms", ".transforms.functional", ".ops", ".functional"):
            absent = mock.MagicMock(name=package + part)
            absent.__spec__ = importlib.machinery.ModuleSpec(package + part, None)
            absent.__path__, absent.__version__ = [], "0"
            sys.modules[package + part] = absent
    import comfy.cli_args

    # ComfyUI's default on a CPU misinterprets boolean masks, see comfy.ldm.modules.sub_quadratic_attention.
    comfy.cli_args.args.cpu = comfy.cli_args.args.use_pytorch_cross_attention = True
    torch.set_num_threads(1)
    load()


@functools.cache
def load():
    """ComfyUI's nodes by name, including ours, loaded as ComfyUI loads a custom node."""
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(NODE)))
    return nodes.NODE_CLASS_MAPPINGS


def attention_module():
    """The node's module ``attention``."""
    load()
    return sys.modules[f"{str(NODE).replace('.', '_x_')}.attention"]


def window(model, radius, frame_radius=None, **others):
    """A model after our nodes."""
    if frame_radius is None:
        return load()["FlexclearImageWindow"]().apply(model, radius, **others)[0]
    return load()["FlexclearVideoWindow"]().apply(model, radius, frame_radius, **others)[0]


FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 256,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "in_dim": 16,
    "dim": 128,
    "ffn_dim": 128,
    "text_dim": 32,
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
}
VACE = {**WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}


@functools.cache
def model(kind: str):
    """A small model with random weights: ComfyUI's ``ModelPatcher`` around its ``BaseModel``."""
    import comfy.model_patcher
    import comfy.supported_models as supported

    made, settings = {
        "flux": (supported.Flux, FLUX),
        "qwen": (supported.QwenImage, QWEN),
        "wan": (supported.WAN21_T2V, WAN),
        "vace": (supported.WAN21_Vace, VACE),
    }[kind]
    config = made(settings)
    config.set_inference_dtype(torch.float32, None)
    torch.manual_seed(0)
    base = config.get_model({}, "", device=torch.device("cpu"))
    with torch.no_grad():
        for name, weight in base.diffusion_model.named_parameters():
            is_norm = "norm" in name and weight.ndim == 1
            weight.copy_(torch.randn(weight.shape) * 0.1 + (1.0 if is_norm else 0.0))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, cpu, cpu)


def conditions(kind: str, text: int, seed: int, **others):
    """Conditioning with random text, in ComfyUI's form."""
    draw = torch.Generator().manual_seed(seed)
    pooled = {"pooled_output": torch.randn(1, 16, generator=draw)} if kind == "flux" else {}
    return [[torch.randn(1, text, 32, generator=draw), {**pooled, **others}]]


def latent(kind: str, *sides: int, batch: int = 1):
    """A random latent of (frames,) height and width; a Qwen-Image has one frame."""
    draw = torch.Generator().manual_seed(7)
    sides = (1, *sides) if kind == "qwen" and len(sides) == 2 else sides
    return torch.randn(batch, 16, *sides, generator=draw)


@torch.inference_mode()
def sample(patcher, noise, positive, negative=None, steps: int = 1):
    """What ComfyUI's sampler makes of noise; with guidance if ``negative`` is given, which puts both halves in one batch."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(patcher)
    guider.set_conds(positive, negative or [])
    guider.set_cfg(1.5 if negative else 1.0)
    sigmas = torch.linspace(1, 0, steps + 1)
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)


def near(grids, radius: int, frames: int = 1, frame_radius: int = 0):
    """Which image tokens see which, from the definition: closer than ``radius``, in frames not further than
    ``frame_radius``. Bool ``[N, N]`` in raster order."""
    place = [torch.cartesian_prod(torch.arange(frames), torch.arange(h), torch.arange(w)) for h, w in grids]
    apart = (torch.cat(place)[:, None] - torch.cat(place)[None]).abs()
    return (apart[..., 1:].square().sum(-1) < radius**2) & (apart[..., 0] <= frame_radius)


class Reference:
    """ComfyUI's attention override for the reference: SDPA under the dense boolean mask. Text comes first, sees all and is seen
    by all.

    Attributes:
        calls: number of times that attention was masked.
    """

    def __init__(self, image, when=lambda options: True) -> None:
        self.image, self.when, self.calls = image, when, 0

    def __call__(self, attention, query, key, value, heads, mask=None, skip_reshape=False, **others):
        text = query.shape[-2] - len(self.image)
        if query.shape[-2] != key.shape[-2] or text < 0 or not self.when(others["transformer_options"]):
            return attention(query, key, value, heads, mask=mask, skip_reshape=skip_reshape, **others)
        self.calls += 1
        seen = F.pad(self.image, (text, 0, text, 0), value=True)
        if mask is not None:  # ComfyUI adds it to the scores: [B, 1, N]
            seen = (seen & (mask == 0))[:, None]
        if not skip_reshape:
            query, key, value = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)


def overridden(patcher, override):
    """A copy of a model with another attention."""
    copy = patcher.clone()
    copy.model_options["transformer_options"]["optimized_attention_override"] = override
    return copy


@contextlib.contextmanager
def backend(name: str):
    """Compute windows by ``"flex"`` or ``"sdpa"``; the node itself chooses one that can run."""
    with mock.patch.object(attention_module(), "choose_backend", return_value=name):
        yield


def far(one, other) -> float:
    """Largest difference, relative to the largest output."""
    return float((one - other).abs().max() / other.abs().max())
