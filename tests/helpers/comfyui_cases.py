"""What tests ask ComfyUI's engine to do: functions that return numbers and words, and run in the engine's process."""

from __future__ import annotations

import traceback
from unittest import mock

import torch

from flexclear.masks import Disc, Layout

from helpers.comfyui_engine import (
    Reference,
    attention_module,
    backend,
    conditions,
    far,
    latent,
    model,
    near,
    overridden,
    sample,
    window,
)

RADIUS, FRAME_RADIUS, TEXT = 4, 1, 20


def tokens(sides):
    """Height and width in tokens, from (frames,) height and width in latents, which the model pads."""
    return tuple(-(-side // 2) for side in sides[-2:])


def padding(hidden: int):
    """Conditioning for padded text: the mask that ComfyUI's text encoders make."""
    mask = torch.ones(1, TEXT, dtype=torch.long)
    mask[:, TEXT - hidden :] = 0
    return {"attention_mask": mask} if hidden else {}


def vace(sides):
    """Conditioning for a control video."""
    draw = torch.Generator().manual_seed(3)
    frames, mask = torch.randn(1, 32, *sides, generator=draw), torch.ones(1, 64, *sides)
    return {"vace_frames": [frames], "vace_mask": [mask], "vace_strength": [0.7]}


def against_dense(
    kind: str,
    sides: tuple[int, ...],
    by: str,
    *,
    batch: int = 1,
    texts=(TEXT, TEXT),
    hidden=(0, 0),
    references=(),
    method=None,
) -> dict:
    """A windowed model against the model under dense masks, with guidance.

    Args:
        kind, sides: the model, and the sides of its latent.
        by: ``"flex"`` or ``"sdpa"``.
        batch: number of latents.
        texts: tokens of the positive and the negative text.
        hidden: how many of them are padding.
        references: height and width of reference latents.
        method: where ComfyUI places the references.
    """
    patcher = model(kind)
    video = kind in ("wan", "vace")
    if kind == "qwen" and len(sides) == 3:  # layers are grids of their own
        grids = [tokens(sides)] * sides[0] + [tokens(each) for each in references]
    else:
        grids = [tokens(sides), *(tokens(each) for each in references)]
    others: dict = vace(sides) if kind == "vace" else {}
    if references:
        others["reference_latents"] = [latent(kind, *each) for each in references]
        others["reference_latents_method"] = method
    given = [
        conditions(kind, text, seed, **padding(pad), **others)
        for seed, text, pad in zip((1, 2), texts, hidden, strict=True)
    ]
    noise = latent(kind, *sides, batch=batch)
    image = near(grids, RADIUS, sides[0], FRAME_RADIUS) if video else near(grids, RADIUS)
    reference = Reference(image)
    expected = sample(overridden(patcher, reference), noise, *given)
    with backend(by):
        got = sample(window(patcher, RADIUS, FRAME_RADIUS if video else None), noise, *given)
    dense = sample(patcher, noise, *given)
    return {"far": far(got, expected), "matters": far(dense, expected), "calls": reference.calls}


def off_again() -> dict:
    """What is left of a window on the model from which the windowed one was made."""
    patcher, noise, given = model("flux"), latent("flux", 16, 20), conditions("flux", TEXT, 1)

    def state():
        held = patcher.model_options, patcher.wrappers, patcher.patches, patcher.object_patches, patcher.callbacks
        hooks = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) for m in patcher.model.modules()]
        return repr(held), hooks, [type(m) for m in patcher.model.modules()]

    before, found = sample(patcher, noise, given), state()
    with backend("sdpa"):
        windowed = sample(window(patcher, RADIUS), noise, given)
    after = sample(patcher, noise, given)
    return {"same": torch.equal(before, after), "state": state() == found, "matters": far(windowed, before)}


def replaced() -> dict:
    """A window on a windowed model."""
    patcher, noise, given = model("flux"), latent("flux", 16, 20), conditions("flux", TEXT, 1)
    first = window(patcher, 2)
    with backend("sdpa"):
        second, alone, other = (
            sample(each, noise, given) for each in (window(first, RADIUS), window(patcher, RADIUS), first)
        )
    count = {kind: len(found["flexclear"]) for kind, found in window(first, RADIUS).wrappers.items()}
    return {"same": torch.equal(second, alone), "matters": far(other, alone), "wrappers": count}


def lora() -> dict:
    """A LoRA before the window and after it."""
    import comfy.sd

    patcher, noise, given = model("flux"), latent("flux", 16, 20), conditions("flux", TEXT, 1)
    draw = torch.Generator().manual_seed(5)
    weights = {}
    for name in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        out, into = patcher.model.diffusion_model.get_submodule(name).weight.shape
        weights[f"diffusion_model.{name}.lora_up.weight"] = 0.3 * torch.randn(out, 4, generator=draw)
        weights[f"diffusion_model.{name}.lora_down.weight"] = 0.3 * torch.randn(4, into, generator=draw)

    def adapted(patcher):
        return comfy.sd.load_lora_for_models(patcher, None, weights, 1.0, 0.0)[0]

    expected = sample(overridden(adapted(patcher), Reference(near([(8, 10)], RADIUS))), noise, given)
    with backend("sdpa"):
        before = sample(window(adapted(patcher), RADIUS), noise, given)
        after = sample(adapted(window(patcher, RADIUS)), noise, given)
        without = sample(window(patcher, RADIUS), noise, given)
    patches = [sorted(map(str, each.patches)) for each in (window(adapted(patcher), RADIUS), adapted(patcher))]
    return {
        "same": torch.equal(before, after),
        "far": far(before, expected),
        "matters": far(without, before),
        "patches": patches[0] == patches[1] and len(patches[0]) == 2,
    }


def dense_steps() -> dict:
    """The first and the last of four steps are dense, with ComfyUI's own noise levels."""
    patcher, noise, given = model("flux"), latent("flux", 16, 20), conditions("flux", TEXT, 1)
    image = near([(8, 10)], RADIUS)
    levels = torch.linspace(1, 0, 5)[1:3].tolist()
    only_between = Reference(image, lambda options: float(options["sigmas"][0]) in levels)
    expected = sample(overridden(patcher, only_between), noise, given, steps=4)
    everywhere = sample(overridden(patcher, Reference(image)), noise, given, steps=4)
    with backend("sdpa"):
        got = sample(window(patcher, RADIUS, dense_first=1, dense_last=1), noise, given, steps=4)
    return {"far": far(got, expected), "matters": far(everywhere, expected), "calls": only_between.calls}


def called(patcher, x, text, **others):
    """One call of the model as ComfyUI's sampler makes it."""
    options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
    return patcher.model.apply_model(x, torch.ones(len(x)), c_crossattn=text, transformer_options=options, **others)


def residuals() -> dict:
    """A ControlNet's residuals, which ComfyUI adds in raster order."""
    patcher, draw = model("flux"), torch.Generator().manual_seed(9)
    text, pooled = torch.randn(2, TEXT, 32, generator=draw), torch.randn(2, 16, generator=draw)
    add = [torch.randn(2, 80, 256, generator=draw) for _ in range(2)]
    given = {"y": pooled, "guidance": torch.ones(2), "control": {"input": add[:1], "output": add[1:]}}
    x, reference = latent("flux", 16, 20, batch=2), Reference(near([(8, 10)], RADIUS))
    with torch.no_grad(), backend("sdpa"):
        each = (overridden(patcher, reference), window(patcher, RADIUS), patcher)
        expected, got, dense = (called(one, x, text, **given) for one in each)
        without = called(each[0], x, text, **{**given, "control": None})
    return {"far": far(got, expected), "matters": min(far(dense, expected), far(without, expected))}


def gradients() -> dict:
    """What ComfyUI's training differentiates. The node itself notices that compiled attention has no gradients on a CPU."""
    import comfy.model_management

    patcher, x = model("wan"), latent("wan", 3, 12, 16)
    text, reference = conditions("wan", TEXT, 1)[0][0], Reference(near([(6, 8)], RADIUS, 3, FRAME_RADIUS))
    slopes = []
    for each in (overridden(patcher, reference), window(patcher, RADIUS, FRAME_RADIUS), patcher):
        x = x.detach().requires_grad_()
        with torch.enable_grad(), mock.patch.object(comfy.model_management, "in_training", True):
            slopes += torch.autograd.grad(called(each, x, text).square().sum(), x)
    expected, got, dense = slopes
    return {"far": far(got, expected), "matters": far(dense, expected)}


def _error(run) -> str:
    try:
        run()
    except Exception as error:
        traceback.clear_frames(error.__traceback__)
        return f"{type(error).__name__}: {error}"
    return "no error"


def refused() -> dict[str, str]:
    """Cases in which a window is refused, and the error of each."""
    import comfy.ldm.wan.model
    import comfy.model_patcher
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    flux, qwen, wan = map(model, ("flux", "qwen", "wan"))
    x, given = latent("flux", 16, 20), conditions("flux", TEXT, 1)

    class Subclass(comfy.ldm.wan.model.WanModel):
        pass

    def other(cls):
        base = torch.nn.Module()
        base.diffusion_model = cls.__new__(cls)
        torch.nn.Module.__init__(base.diffusion_model)
        return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))

    def someone(attention, *args, **kwargs):
        return attention(*args, **kwargs)

    def compiled(patcher):
        copy = patcher.clone()
        set_torch_compile_wrapper(copy, backend="eager")
        return copy

    def patched(patcher, patch, name):
        copy = patcher.clone()
        copy.set_model_patch(patch, name)
        return copy

    def with_more_tokens(args):
        args["img"] = torch.cat([args["img"], args["img"][:, :8]], dim=1)
        args["img_ids"] = torch.cat([args["img_ids"], args["img_ids"][:, :8]], dim=1)
        return args

    def with_a_mask(q, k, v, pe, attn_mask, extra_options):
        return {"attn_mask": torch.zeros(q.shape[-2], k.shape[-2])}

    def skipping(patcher):
        copy = patcher.clone()
        for kind, count in (("double_block", 2), ("single_block", 2)):
            for number in range(count):
                copy.set_model_patch_replace(lambda args, _: args, "dit", kind, number)
        return copy

    weighed = {"attention_mask": torch.linspace(-1, 0, TEXT)[None]}
    style = torch.zeros(1, TEXT + 80, TEXT + 80)
    clip = torch.randn(1, 16, 1, 8, 10)
    text = torch.randn(1, TEXT, 32)
    pooled = {"y": torch.zeros(1, 16), "guidance": torch.ones(1)}
    cases = {
        "a subclass": lambda: window(other(Subclass), 4, 1),
        "another class": lambda: window(other(comfy.ldm.wan.model.CameraWanModel), 4, 1),
        "an image window on a video": lambda: window(wan, 4),
        "a video window on an image": lambda: window(flux, 4, 1),
        "another override before": lambda: window(overridden(flux, someone), 4),
        "another override behind": lambda: sample(overridden(window(flux, 4), someone), x, given),
        "compiled before": lambda: window(compiled(flux), 4),
        "compiled behind": lambda: sample(compiled(window(flux, 4)), x, given),
        "more tokens": lambda: sample(patched(window(flux, 4), with_more_tokens, "post_input"), x, given),
        "a mask": lambda: sample(patched(window(flux, 4), with_a_mask, "attn1_patch"), x, given),
        "no attention": lambda: sample(skipping(window(flux, 4)), x, given),
        "a mask over the image": lambda: called(window(flux, 4), x, text, attention_mask=style, **pooled),
        "weighed text": lambda: sample(window(qwen, 4), latent("qwen", 16, 20), conditions("qwen", TEXT, 1, **weighed)),
        "a latent without frames": lambda: called(window(qwen, 4), x, text),
        "as many tokens as text": lambda: sample(window(wan, 4, 1), clip, conditions("wan", TEXT, 1)),
        "reference videos": lambda: called(window(wan, 4, 1), clip, text, context_latents=[clip]),
        "steps that nobody counts": lambda: called(window(flux, 4, dense_first=1), x, text, **pooled),
    }
    return {name: _error(run) for name, run in cases.items()}


def asked_directly():
    """What attention in a windowed call does with a mask of cross-attention, with heads apart, and with an option."""
    module = attention_module()
    tokens = module.Tokens(Layout(6, 5, 0), beside=frozenset({7}))
    call = module.WindowedCall(tokens, Disc(2))
    query, text = torch.randn(1, 2, 30, 16), torch.randn(1, 2, 7, 16)
    mask, seen = torch.ones(30, 7, dtype=torch.bool), []

    def attention(*args, mask, **options):
        seen.append(mask)
        return args[0]

    call.attend(attention, query, text, text, 2, mask, skip_reshape=True)
    apart = call.attend(attention, query, query, query, 2, skip_reshape=True, skip_output_reshape=True)
    joined = call.attend(attention, query, query, query, 2, skip_reshape=True)
    try:
        call.attend(attention, query, query, query, 2, skip_reshape=True, scale=2.0)
        said = ""
    except ValueError as error:
        said = str(error)
    return {
        "mask": len(seen) == 1 and seen[0] is mask,
        "apart": tuple(apart.shape),
        "same": torch.equal(apart.transpose(1, 2).flatten(2), joined),
        "said": said,
    }


def told_by_a_call():
    """What one call of a transformer leaves in ComfyUI's options, and which keys Wan's cross-attention has."""
    module = attention_module()
    windows = module.Windows(lambda model, given: module.Tokens(Layout(6, 5, 0)), Disc(2), (0, 0))
    query, inside = torch.randn(1, 2, 30, 16), []

    class Model:
        def forward(self, x, transformer_options):
            inside.append(module.NAME in transformer_options)
            return windows(None, x, x, x, 2, skip_reshape=True, transformer_options=transformer_options)

    class Executor:
        class_obj = Model()

        def __call__(self, x, transformer_options):
            return self.class_obj.forward(x, transformer_options)

    options = {module.OVERRIDE: windows}
    windows.around_model(Executor(), query, options)
    wan = model("wan").get_model_object("diffusion_model")
    given = {"x": torch.zeros(1, 16, 3, 8, 8), "context": torch.zeros(1, TEXT, 16), "clip_fea": torch.zeros(1, 257, 16)}
    return {
        "inside": inside,
        "left": list(options) != [module.OVERRIDE],
        "keys": sorted(module.reader(wan, True)(wan, given).beside),
    }
