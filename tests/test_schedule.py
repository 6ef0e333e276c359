"""A window per layer, and dense first and last steps, against stock models with dense masks of their own."""

from __future__ import annotations

import copy
import gc
from argparse import Namespace

import pytest
import torch

import flexclear
from flexclear.masks import Disc, Full, Layout, Square, Swin, dense_mask
from flexclear.runtime.hooks import entry_hook_of
from flexclear.runtime.plan import plans
from flexclear.runtime.steps import StepCounter

from helpers.models import flux_call, tiny_flux

GRIDS = [(9, 13, 7), (16, 8, 20)]
LAYERS = [
    "transformer_blocks.0.attn",
    "transformer_blocks.1.attn",
    "single_transformer_blocks.0.attn",
    "single_transformer_blocks.1.attn",
]


@pytest.fixture
def model():
    return tiny_flux()


def masked_processor(mask):
    """diffusers' own processor, given a mask of its own."""
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class Masked(FluxAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
            return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)

    return Masked()


def masked(model, windows, height, width, text_len):
    """A copy of a stock model whose layers get the dense masks of these windows, None for none."""
    copied = copy.deepcopy(model)
    layout = Layout(height, width, text_len, order="raster")
    for name, window in zip(LAYERS, windows, strict=True):
        mask = None if window is None else dense_mask(layout, window)
        copied.get_submodule(name).set_processor(masked_processor(mask))
    return copied


def run(model, call):
    with torch.no_grad():
        return model(**call).sample


SCHEDULES = {
    "one for all": (3, [Disc(3)] * 4),
    "list": ([2, 3, 5, 2], [Disc(2), Disc(3), Disc(5), Disc(2)]),
    "tuple with dense layers": ((None, 3, 3, None), [None, Disc(3), Disc(3), None]),
    "range": (range(2, 6), [Disc(2), Disc(3), Disc(4), Disc(5)]),
    "by index": ({0: 2, 1: None, 2: 4, 3: 3}, [Disc(2), None, Disc(4), Disc(3)]),
    "by name": ({LAYERS[1]: 2, LAYERS[2]: 5, "default": 3}, [Disc(3), Disc(2), Disc(5), Disc(3)]),
    "by stack": (
        {"transformer_blocks": 2, "single_transformer_blocks": Square(3)},
        [Disc(2), Disc(2), Square(3), Square(3)],
    ),
    "longest beginning": (
        {"transformer_blocks": 2, "transformer_blocks.1": 4, "default": None},
        [Disc(2), Disc(4), None, None],
    ),
    "index before name": ({1: 5, "transformer_blocks": 2, "default": 3}, [Disc(2), Disc(5), Disc(3), Disc(3)]),
    "function": (
        lambda index, name: 2 + index if name.startswith("transformer") else None,
        [Disc(2), Disc(3), None, None],
    ),
    "windows": (
        [Square(2), Swin(4, 2), Disc(2) | Square(2), Full()],
        [Square(2), Swin(4, 2), Disc(2) | Square(2), None],
    ),
    "one window": (Square(3), [Square(3)] * 4),
}


@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize("case", SCHEDULES)
def test_every_way_to_say_a_radius_per_layer_equals_a_dense_mask_per_layer(model, case, order):
    r, windows = SCHEDULES[case]
    original = copy.deepcopy(model)
    flexclear.transform(model, r=r, order=order, backend="sdpa")
    for batch, (height, width, text_len) in enumerate(GRIDS, 1):
        call = flux_call(height, width, text_len, batch)
        expected = run(masked(original, windows, height, width, text_len), call)
        assert (run(model, call) - expected).abs().max() <= 1e-4
        assert (run(original, call) - expected).abs().max() > 1e-3, "the windows make no difference here"


def test_a_schedule_of_dense_layers_only_is_the_original(model):
    call = flux_call(9, 13, 7)
    expected = run(model, call)
    assert (run(flexclear.transform(model, r=None, backend="sdpa"), call) - expected).abs().max() <= 1e-5


def test_layers_with_the_same_window_share_a_mask(model):
    flexclear.transform(model, r=[3, 2, 3, None], backend="sdpa")
    entry = entry_hook_of(model)
    assert entry.settings.slots == (("joint", Disc(3)), ("joint", Disc(2)), ("joint", None))
    assert [model.get_submodule(name).processor.slot for name in LAYERS] == [0, 1, 0, 2]
    assert list(entry.settings.windows.items()) == list(zip(LAYERS, [Disc(3), Disc(2), Disc(3), None], strict=True))
    plans.clear()
    for _ in range(2):
        run(model, flux_call(9, 13, 7))
    assert plans.stats().misses == 3


BAD = {
    "too short": ([2, 3], ValueError, "r as a sequence needs one radius per attention layer: 4, got 2"),
    "empty": ([], ValueError, "one radius per attention layer: 4, got 0"),
    "element": ([2, 3, 0, 2], ValueError, r"got 0 \(for single_transformer_blocks\.0\.attn\)"),
    "element type": ([2, 3, 2, "4"], TypeError, r"got '4' \(str\) \(for single_transformer_blocks\.1\.attn\)"),
    "unknown name": ({"blocks": 2, "default": 3}, ValueError, "the key 'blocks', which names no attention layer. Keys are"),
    "half a name": ({"transformer_block": 2, "default": 3}, ValueError, "the key 'transformer_block', which names no"),
    "index too large": ({4: 2, "default": 3}, ValueError, "the key 4, which names no attention layer. Keys are indices 0 to 3"),
    "index negative": ({-1: 2, "default": 3}, ValueError, "the key -1, which names no attention layer"),
    "index bool": ({True: 2, "default": 3}, ValueError, "the key True, which names no attention layer"),
    "index float": ({1.0: 2, "default": 3}, ValueError, r"the key 1\.0, which names no attention layer"),
    "layer left out": ({"transformer_blocks": 2}, ValueError, r"does not cover single_transformer_blocks\.0\.attn \(layer 2\)"),
    "function": (lambda index, name: 2 - index, ValueError, r"got 0 \(for single_transformer_blocks\.0\.attn\)"),
    "function type": (lambda index, name: "2", TypeError, r"got '2' \(str\) \(for transformer_blocks\.0\.attn\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_schedule_is_named_and_nothing_is_changed(model, case):
    r, error, message = BAD[case]
    processors = model.attn_processors
    with pytest.raises(error, match=message):
        flexclear.transform(model, r=r)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert not model._forward_pre_hooks


# Dense first and last steps, in the embedded pipeline.


@pytest.fixture(scope="module")
def base():
    pipe = flexclear.embedded.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(base):
    scheduler = base.scheduler
    yield base
    flexclear.restore(base)
    base.scheduler = scheduler


def draw(pipe, steps=4, **options):
    return pipe(
        "a red apple on a blue background",
        height=96,
        width=64,
        num_inference_steps=steps,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **options,
    ).images


def by_hand(pipe, r_of_call, **options):
    """The stock pipeline with the dense mask of radius ``r_of_call[n]`` in the n-th call of its transformer."""
    radii = iter(r_of_call)

    def give(module, args, kwargs):
        r = next(radii)
        mask = None if r is None else dense_mask(Layout(12, 8, 16, order="raster"), Disc(r))
        return args, {**kwargs, "joint_attention_kwargs": {"attention_mask": mask}}

    hook = pipe.transformer.register_forward_pre_hook(give, with_kwargs=True)
    try:
        drawn = draw(pipe, **options)
    finally:
        hook.remove()
    assert not list(radii), "the pipeline made fewer calls"
    return drawn


@pytest.mark.parametrize(
    ("dense_steps", "radii"),
    [
        ((1, 1), [None, 3, 3, None]),
        ((2, 0), [None, None, 3, 3]),
        ((0, 1), [3, 3, 3, None]),
        ((0, 0), [3, 3, 3, 3]),
        ((3, 2), [None] * 4),
        ((0, 9), [None] * 4),
    ],
)
def test_dense_steps_equal_a_run_that_masks_only_the_others(pipe, dense_steps, radii):
    expected = by_hand(pipe, radii)
    flexclear.transform(pipe, r=3, dense_steps=dense_steps, backend="sdpa")
    for _ in range(2):  # a second run starts to count anew
        assert (draw(pipe) - expected).abs().max() <= 1e-4
    flexclear.restore(pipe)
    if len(set(radii)) > 1:
        for same in (3, None):
            assert (by_hand(pipe, [same] * 4) - expected).abs().max() > 1e-2


def test_dense_steps_count_steps_not_calls_under_true_guidance(pipe):
    options = {"true_cfg_scale": 2.0, "negative_prompt": "a green leaf", "steps": 3}
    expected = by_hand(pipe, [None, None, 3, 3, 3, 3], **options)
    flexclear.transform(pipe, r=3, dense_steps=(1, 0), backend="sdpa")
    assert (draw(pipe, **options) - expected).abs().max() <= 1e-4


def test_dense_steps_follow_a_scheduler_that_was_replaced_after_transform(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler

    flexclear.transform(pipe, r=3, dense_steps=(1, 1), backend="sdpa")
    draw(pipe, steps=2)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=2.0)
    ours = draw(pipe)
    assert (ours - by_hand(flexclear.restore(pipe), [None, 3, 3, None])).abs().max() <= 1e-4


SECOND_ORDER = ("FlowMatchHeun", "Heun", "KDPM2", "KDPM2Ancestral")


def dense_calls(scheduler, dense_steps, begin=0):
    """For each evaluation of a run of this scheduler, "D" where it is dense and "w" where it has windows."""
    pipe, sample, found = Namespace(scheduler=scheduler), torch.zeros(1, 4), ""
    counter = StepCounter(pipe)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(begin * scheduler.order)
    for timestep in scheduler.timesteps[begin * scheduler.order :]:
        found += "D" if counter.is_dense(dense_steps) else "w"
        sample = scheduler.step(torch.ones_like(sample), timestep, sample).prev_sample
    return found


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_dense_steps_count_steps_not_evaluations_of_schedulers_of_second_order(name):
    import diffusers

    scheduler = getattr(diffusers, f"{name}DiscreteScheduler")()
    assert dense_calls(scheduler, (1, 1)) == "DDwwwwwwD"
    assert dense_calls(scheduler, (2, 0)) == "DDDDwwwww"
    assert dense_calls(scheduler, (0, 2)) == "wwwwwwDDD"
    assert dense_calls(scheduler, (1, 1), begin=2) == "DDwwD"  # image-to-image begins within the schedule


@pytest.mark.parametrize("known", [True, False])
def test_dense_steps_count_from_where_a_run_begins_although_the_scheduler_is_not_told(known):
    """As in Wan's video to video, by that pipeline itself (``known``) or by one that shares its scheduler."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = Namespace(scheduler=scheduler)
    counter = StepCounter(pipe)

    def dense(dense_steps, begin):
        scheduler.set_timesteps(8)
        timesteps = scheduler.timesteps[begin:]
        if known:
            pipe.get_timesteps, pipe._num_timesteps = None, len(timesteps)
        sample, found = torch.zeros(1, 4), ""
        for timestep in timesteps:
            found += "".join("D" if counter.is_dense(dense_steps) else "w" for _ in range(2))  # with guidance
            sample = scheduler.step(torch.ones_like(sample), timestep, sample).prev_sample
        return found[::2] if found[::2] == found[1::2] else found

    assert dense((2, 1), begin=3) == "DDwwD"
    assert dense((2, 1), begin=0) == "DDwwwwwD"
    assert dense((1, 0), begin=5) == "Dww"
    assert dense((0, 4), begin=4) == ("DDDD" if known else "wDDD")


def test_dense_steps_of_a_pipeline_under_heun_s_method(pipe):
    from diffusers import FlowMatchHeunDiscreteScheduler

    class Heun(FlowMatchHeunDiscreteScheduler):
        """FluxPipeline hands over noise levels, which Heun's method makes for itself."""

        def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None):
            super().set_timesteps(num_inference_steps or len(sigmas), device)

    pipe.scheduler = Heun()
    expected = by_hand(pipe, [None, None, 3, 3, None], steps=3)
    flexclear.transform(pipe, r=3, dense_steps=(1, 1), backend="sdpa")
    assert (draw(pipe, steps=3) - expected).abs().max() <= 1e-4


def test_dense_steps_count_from_the_first_step_that_image_to_image_runs(pipe):
    from diffusers import FluxImg2ImgPipeline
    from PIL import Image

    guided = FluxImg2ImgPipeline.from_pipe(pipe)
    guided.set_progress_bar_config(disable=True)
    options = {"image": Image.radial_gradient("L").resize((64, 96)).convert("RGB"), "strength": 0.6, "steps": 5}
    expected = by_hand(guided, [None, 3, None], **options)
    flexclear.transform(guided, r=3, dense_steps=(1, 1), backend="sdpa")
    assert (draw(guided, **options) - expected).abs().max() <= 1e-4
    flexclear.restore(guided)
    assert (by_hand(guided, [3, 3, 3], **options) - expected).abs().max() > 1e-2


def test_a_radius_that_changes_between_two_steps_holds_from_the_next_step_on(pipe):
    expected = by_hand(pipe, [2, 2, 5, None])

    def change(pipe, step, timestep, tensors):
        if step == 1:
            flexclear.transform(pipe, r=5, order="raster", backend="sdpa")
        if step == 2:
            flexclear.restore(pipe)
        return tensors

    flexclear.transform(pipe, r=2, backend="sdpa")
    assert (draw(pipe, callback_on_step_end=change) - expected).abs().max() <= 1e-4


def test_a_schedule_that_changes_mid_run_leaves_nothing_behind(pipe):
    flexclear.transform(pipe, r=3, backend="sdpa")
    alone = draw(pipe)

    def change(pipe, step, timestep, tensors):
        flexclear.transform(pipe, r=lambda index, name: 2 + (index + step) % 3, backend="sdpa")
        return tensors

    assert (draw(pipe, callback_on_step_end=change) - alone).abs().max() > 1e-2
    flexclear.transform(pipe, r=3, backend="sdpa")
    assert torch.equal(draw(pipe), alone)


@pytest.mark.parametrize("given", [1, (1,), (1, 2, 3), [1, 1], (-1, 0), (1.0, 0), (True, 0), "11"])
def test_dense_steps_that_make_no_sense_are_named(pipe, given):
    with pytest.raises(ValueError, match=r"dense_steps must be \(first, last\), two step counts >= 0, got"):
        flexclear.transform(pipe, dense_steps=given)
    assert entry_hook_of(pipe.transformer) is None


def test_the_bare_model_does_not_know_its_step(pipe):
    with pytest.raises(ValueError, match=r"dense_steps counts denoising steps.*must be given the pipeline"):
        flexclear.transform(pipe.transformer, dense_steps=(1, 0))
    assert entry_hook_of(pipe.transformer) is None
    flexclear.transform(pipe.transformer, r=3, backend="sdpa")
    with (
        flexclear.override(dense_steps=(1, 0)),
        pytest.raises(ValueError, match="must be given the pipeline"),
    ):
        draw(pipe)


def test_a_scheduler_that_counts_no_steps_is_named(pipe):
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"needs a scheduler that counts steps.*DDIMScheduler does not"):
        flexclear.transform(pipe, dense_steps=(1, 0))
    assert entry_hook_of(pipe.transformer) is None


def test_a_pipeline_that_is_gone_counts_no_steps(pipe):
    from diffusers import FluxPipeline

    gone = FluxPipeline(**pipe.components)
    flexclear.transform(gone, r=3, dense_steps=(1, 0), backend="sdpa")
    del gone
    gc.collect()
    with pytest.raises(ValueError, match="the pipeline must still exist"):
        draw(pipe)
