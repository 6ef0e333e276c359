"""Z-Image: pads and captions are text behind the image, and the plan rides on the embedding of the timestep."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor
from PIL import Image

import flexclear
from flexclear.compile import why_not_compiled
from flexclear.masks import Disc, Layout, dense_mask

CPU = torch.device("cpu")
R = 3
CHANNELS, TEXT = 4, 12
SHAPES = [(16, 16), (9, 13), (24, 7)]  # no pads, 11 and 24 of them
CAPTIONS = [(20,), (33, 7), (7, 32), (65, 1)]  # the second and the last are padded to different lengths


def tiny_zimage(**config):
    """A ZImageTransformer2DModel of 1 + 1 + 2 blocks, 2 heads x 16, random weights, pad tokens too, in eval mode."""
    from diffusers import ZImageTransformer2DModel

    torch.manual_seed(0)
    sizes = {
        "in_channels": CHANNELS,
        "dim": 32,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT,
        "axes_dims": [4, 6, 6],
        "axes_lens": [200, 64, 64],
    }
    model = ZImageTransformer2DModel(**{**sizes, **config}).eval()
    torch.nn.init.normal_(model.x_pad_token)
    torch.nn.init.normal_(model.cap_pad_token)
    return model


@pytest.fixture
def model():
    return tiny_zimage()


def call_of(height, width, captions, seed=0):
    """Keyword arguments of a call with random inputs, for a grid of ``height`` x ``width`` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "x": [noise(CHANNELS, 1, 2 * height, 2 * width) for _ in captions],
        "t": torch.linspace(0.3, 0.7, len(captions)),
        "cap_feats": [noise(length, TEXT) for length in captions],
    }


def padded(length):
    return -(-length // 32) * 32


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


@pytest.mark.parametrize("order", ["tiled", "raster"])
@pytest.mark.parametrize("captions", CAPTIONS)
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_a_transformed_model_equals_the_original_under_the_dense_mask(model, order, captions, height, width):
    call = call_of(height, width, captions)
    reference, dense = run(masked(model, height, width, captions), call), run(model, call)
    flexclear.transform(model, r=R, backend="sdpa", order=order)
    assert (run(model, call) - reference).abs().max() <= 1e-4
    assert (dense - reference).abs().max() > 1e-3, "the window makes no difference here"


@pytest.mark.skipif(why_not_compiled(CPU) is not None, reason=str(why_not_compiled(CPU)))
def test_a_compiled_block_finds_its_plan_without_a_graph_break():
    model = tiny_zimage(n_layers=1)
    call = call_of(9, 13, (33, 7))
    reference = masked(model, 9, 13, (33, 7))
    reference.noise_refiner[0].attention.set_processor(ZSingleStreamAttnProcessor())
    flexclear.transform(model, r={"layers": R, "default": None}, backend="flex")
    model.layers[0].compile(fullgraph=True)
    assert (run(model, call) - run(reference, call)).abs().max() <= 1e-4


def test_the_refiner_alone_and_the_layers_alone_can_be_windowed(model):
    call = call_of(9, 13, (20,))
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


def test_restore_is_bit_identical_and_leaves_no_hook(model):
    call = call_of(9, 13, (33, 7))
    before, processors = run(model, call), [m.processor for m in model.modules() if hasattr(m, "processor")]
    run(flexclear.transform(model, r=R, backend="sdpa"), call)
    flexclear.restore(model)
    assert torch.equal(run(model, call), before)
    assert [m.processor for m in model.modules() if hasattr(m, "processor")] == processors
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_caller_keeps_its_own_arguments_and_gets_what_it_asked_for(model):
    call = call_of(9, 13, (33, 7))
    before = copy.deepcopy(call)
    flexclear.transform(model, r=R, backend="sdpa")
    with torch.no_grad():
        as_tuple = model(call["x"], call["t"], call["cap_feats"], False)
    assert isinstance(as_tuple, tuple)
    assert isinstance(as_tuple[0], list)
    assert torch.equal(torch.stack(as_tuple[0]), run(model, call))
    assert all(torch.equal(a, b) for name in ("x", "cap_feats") for a, b in zip(call[name], before[name], strict=True))
    assert not hasattr(call["t"], "flexclear_plan")


def test_sizes_and_captions_may_alternate(model):
    flexclear.transform(model, r=R, backend="sdpa")
    calls = [call_of(9, 13, (33, 7)), call_of(16, 16, (20,)), call_of(9, 13, (33, 7))]
    first, _, again = (run(model, call) for call in calls)
    assert torch.equal(first, again)


def test_controlnet_residuals_follow_the_token_order(model):
    height, width, captions = 9, 13, (33, 7)
    call = call_of(height, width, captions)
    residuals = {0: torch.randn(2, padded(height * width) + 64, 32)}
    reference = run(masked(model, height, width, captions), call, controlnet_block_samples=residuals)
    without = run(masked(model, height, width, captions), call)
    flexclear.transform(model, r=R, backend="sdpa")
    assert (run(model, call, controlnet_block_samples=residuals) - reference).abs().max() <= 1e-4
    assert (without - reference).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"controlnet_block_samples\[1\] of shape \(2, 5, 32\).*192 tokens"):
        run(model, call, controlnet_block_samples={1: torch.randn(2, 5, 32)})


def test_an_ntk_factor_stretches_the_rotary_base_wherever_there_are_image_tokens(model):
    call = call_of(9, 13, (33, 7))
    stretched = tiny_zimage(rope_theta=2560.0)
    stretched.load_state_dict(model.state_dict())
    stretched = masked(stretched, 9, 13, (33, 7))
    places = torch.zeros(64, 3, dtype=torch.int64)
    places[:, 0] = torch.arange(1, 65)
    own = model.rope_embedder(places)[None]
    for block in stretched.context_refiner:  # captions alone keep the frequencies that the model has
        block.register_forward_pre_hook(lambda module, args: (*args[:2], own))
    reference = run(stretched, call)
    plain = run(flexclear.transform(model, r=R, backend="sdpa"), call)
    with flexclear.override(ntk_factor=10.0):
        assert (run(model, call) - reference).abs().max() <= 1e-4
    assert (plain - reference).abs().max() > 1e-3
    assert torch.equal(run(model, call), plain)


def test_training_has_the_gradients_of_the_dense_mask(model):
    call = call_of(9, 13, (33, 7))
    original = masked(model, 9, 13, (33, 7))
    flexclear.transform(model, r=R)
    for each in (model, original):
        torch.stack(each(**call).sample).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-6), name


def test_gradient_checkpointing_gives_the_same_gradients(model):
    call = call_of(9, 13, (33, 7))
    flexclear.transform(model, r=R)
    torch.stack(model.train()(**call).sample).square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.enable_gradient_checkpointing()
    torch.stack(model(**call).sample).square().mean().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-7) for a, p in zip(plain, model.parameters(), strict=True))


def test_checkpointing_that_loses_the_plan_is_refused_with_the_reason(model):
    flexclear.transform(model, r=R)
    model.train().enable_gradient_checkpointing()
    with torch.autograd.graph.save_on_cpu():
        loss = torch.stack(model(**call_of(9, 13, (20,))).sample).sum()
        with pytest.raises(ValueError, match=r"called without its window.*use_reentrant"):
            loss.backward()


def test_two_models_and_many_threads_do_not_mix():
    calls = {size: call_of(*size, (33, 7)) for size in ((8, 8), (6, 11))}
    models = {r: flexclear.transform(tiny_zimage(), r=r, backend="sdpa") for r in (2, 4)}
    alone = {(r, size): run(model, call) for r, model in models.items() for size, call in calls.items()}
    wrong = []

    def work(r, size):
        for _ in range(10):
            if not torch.equal(run(models[r], calls[size]), alone[r, size]):
                wrong.append((r, size))

    threads = [threading.Thread(target=work, args=key) for key in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_exception_inside_leaves_the_model_and_its_blocks_as_they_were(model):
    call = call_of(9, 13, (20,))
    flexclear.transform(model, r=R, backend="sdpa")
    expected = run(model, call)
    with pytest.raises(RuntimeError):
        run(model, {**call, "cap_feats": [torch.randn(20, TEXT + 1)]})
    with pytest.raises(ValueError, match="called without its window"):
        model.layers[0](torch.randn(1, 8, 32), None, None, torch.randn(1, 32))
    assert torch.equal(run(model, call), expected)


def test_a_block_s_embedding_may_have_another_type_than_the_latents(model):
    call = call_of(9, 13, (20,))
    model.to(torch.bfloat16).t_embedder.to(torch.float32)
    call = {**call, "x": [x.bfloat16() for x in call["x"]], "cap_feats": [c.bfloat16() for c in call["cap_feats"]]}
    reference = run(masked(model, 9, 13, (20,)), call).float()
    ours = run(flexclear.transform(model, r=R, backend="sdpa"), call).float()
    assert (ours - reference).norm() / reference.norm() <= 2e-2


@pytest.mark.parametrize("offload_first", [True, False])
def test_hooks_that_move_a_call_s_arguments_move_the_timestep_with_its_plan(model, offload_first):
    accelerate = pytest.importorskip("accelerate")
    call = call_of(9, 13, (33, 7))
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
        ({"cap_feats": [torch.randn(3, TEXT)] * 2}, "x holds 1 pictures, cap_feats 2 captions"),
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
        run(model, {**call_of(4, 4, (3,)), **changes})


def test_the_longest_caption_that_the_positions_allow_works(model):
    call = call_of(4, 4, (192,))
    reference = run(masked(model, 4, 4, (192,)), call)
    assert (run(flexclear.transform(model, r=R, backend="sdpa"), call) - reference).abs().max() <= 1e-4


def test_a_plugin_s_processor_is_refused(model):
    model.layers[1].attention.set_processor(lambda attn, hidden_states, **kwargs: hidden_states)
    with pytest.raises(TypeError, match=r"layers\[1\].attention has a function; flexclear replaces"):
        flexclear.transform(model, r=R)


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
