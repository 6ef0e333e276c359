"""IP-Adapters through ``pipe.load_ip_adapter`` on a transformed FLUX: loaded, scaled per block, unloaded, at any time."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.transformers import transformer_flux as flux
from safetensors.torch import save_file

import flexclear
from flexclear.masks import Disc, Layout, dense_mask
from flexclear.runtime.processors import windowed

from helpers.models import flux_call

PICTURE = 6
"""Length of the image embeddings that the adapters take."""


def adapter_file(folder, model, seed):
    """An adapter in the layout of the published files: image tokens, and keys and values per double-stream block."""
    generator = torch.Generator().manual_seed(seed)
    text, width = model.config.joint_attention_dim, model.inner_dim

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    weights = {
        "ip_adapter_proj_model.norm.weight": torch.ones(text),
        "ip_adapter_proj_model.norm.bias": torch.zeros(text),
        "ip_adapter_proj_model.proj.weight": noise(4 * text, PICTURE),
        "ip_adapter_proj_model.proj.bias": noise(4 * text),
    }
    for index in range(len(model.transformer_blocks)):
        for kind in ("k", "v"):
            name = f"double_blocks.{index}.processor.ip_adapter_double_stream_{kind}_proj"
            weights[f"{name}.weight"], weights[f"{name}.bias"] = noise(width, text), noise(width)
    save_file(weights, folder / f"adapter_{seed}.safetensors")
    return f"adapter_{seed}.safetensors"


@pytest.fixture
def load(tmp_path, twins):
    """Load adapters with the given seeds into both twins, together."""
    twins.both(lambda pipe: setattr(pipe, "feature_extractor", object()))  # it would be made for images of 224 px

    def load_both(*seeds):
        names = [adapter_file(tmp_path, twins.theirs.transformer, seed) for seed in seeds]
        twins.both(
            lambda pipe: pipe.load_ip_adapter(
                str(tmp_path), weight_name=names, image_encoder_pretrained_model_name_or_path=None
            )
        )

    return load_both


def pictures(adapters=1, seed=0, batch=2, each=1):
    """Joint attention arguments with the embeddings of ``each`` images per adapter."""
    generator = torch.Generator().manual_seed(100 + seed)
    embeddings = [torch.randn(batch, each, PICTURE, generator=generator) for _ in range(adapters)]
    return {"ip_adapter_image_embeds": embeddings}


def dense(pipe, extra):
    with torch.no_grad():
        return pipe.transformer(**flux_call(9, 13, 20, 2), joint_attention_kwargs=dict(extra)).sample


@pytest.mark.parametrize("order", ["tiled", "raster"])
def test_an_adapter_loaded_before_gives_what_it_gives_under_the_dense_mask(twins, load, order):
    load(1)
    keys = list(twins.theirs.transformer.state_dict())
    twins.transform(order=order)
    one, other = (twins.agree(extra=pictures(seed=seed)) for seed in (0, 1))
    assert (one - other).abs().max() > 1e-2, "the image makes no difference"
    twins.agree(7, 16, 5, batch=1, extra=pictures(batch=1))
    twins.agree(extra=pictures(each=3))
    assert sorted(twins.ours.transformer.state_dict()) == sorted(keys)


def test_a_restored_model_has_the_adapter_s_own_processors_and_its_output_bit_for_bit(twins, load):
    load(1)
    before, own = dense(twins.ours, pictures()), twins.ours.transformer.attn_processors
    twins.transform().agree(extra=pictures())
    flexclear.restore(twins.ours)
    assert torch.equal(dense(twins.ours, pictures()), before)
    assert all(processor is own[name] for name, processor in twins.ours.transformer.attn_processors.items())


def test_an_adapter_loaded_afterwards_asks_for_another_transform(twins, load):
    twins.transform()
    load(1)
    with pytest.raises(
        RuntimeError, match=r"was given a FluxIPAdapterAttnProcessor after .*transform\(model, \.\.\.\) again"
    ):
        dense(twins.ours, pictures())
    twins.transform().agree(extra=pictures())
    flexclear.restore(twins.ours)
    assert torch.equal(dense(twins.ours, pictures()), dense(twins.theirs, pictures()))


def test_scales_are_set_per_block_on_the_transformed_model_and_stay_when_restored(twins, load):
    load(1)
    twins.transform()
    whole = twins.agree(extra=pictures())
    seen = [whole]
    for scale in (0.3, [0.0, 1.0], [0.8, 0.0], 0.0):
        twins.both(lambda pipe, s=scale: pipe.set_ip_adapter_scale(s))
        seen.append(twins.agree(extra=pictures()))
        assert all((seen[-1] - before).abs().max() > 1e-3 for before in seen[:-1])
    twins.both(lambda pipe: pipe.set_ip_adapter_scale([0.5, 0.2]))
    flexclear.restore(twins.ours)
    assert torch.equal(dense(twins.ours, pictures()), dense(twins.theirs, pictures()))


def test_two_adapters_act_together_with_a_scale_each(twins, load):
    load(1, 2)
    twins.transform()
    both = twins.agree(extra=pictures(2))
    twins.both(lambda pipe: pipe.set_ip_adapter_scale([0.7, [0.0, 0.4]]))
    assert (twins.agree(extra=pictures(2)) - both).abs().max() > 1e-3


def test_an_unloaded_adapter_asks_for_another_transform_and_is_gone(twins, load):
    plain = twins.transform().agree()
    load(1)
    twins.transform().agree(extra=pictures())
    twins.both(lambda pipe: pipe.unload_ip_adapter())
    with pytest.raises(RuntimeError, match=r"Call flexclear\.transform"):
        dense(twins.ours, {})
    assert torch.equal(twins.transform().agree(), plain)
    assert {type(p) for p in twins.ours.transformer.attn_processors.values()} == {windowed(flux.FluxAttnProcessor)}
    flexclear.restore(twins.ours)
    assert torch.equal(dense(twins.ours, {}), dense(twins.theirs, {}))


def test_an_adapter_without_a_picture_leaves_the_call_as_it_is(twins, load):
    plain = twins.transform().agree()
    load(1)
    twins.transform()
    kinds = [type(p) for p in twins.ours.transformer.attn_processors.values()]
    assert kinds == [windowed(flux.FluxIPAdapterAttnProcessor)] * 2 + [windowed(flux.FluxAttnProcessor)] * 2
    with torch.no_grad():
        assert torch.equal(twins.ours.transformer(**flux_call(9, 13, 20, 2)).sample, plain)


def test_an_adapter_and_down_sampled_keys_refuse_each_other_before_any_change(twins, load):
    load(1)
    with pytest.raises(ValueError, match=r"transformer_blocks.0.attn has an IP-Adapter, .*\(down_factor=2\)"):
        twins.transform(down_factor=2)
    assert not twins.ours.transformer._forward_pre_hooks
    twins.ours.unload_ip_adapter()
    twins.transform(down_factor=2)
    with pytest.raises(
        TypeError, match=r"trained weights of their own \(spatial_weight\), which a plugin is about to drop"
    ):
        load(1)


def test_the_adapter_moves_and_is_copied_with_the_model(twins, load):
    load(1)
    twins.transform()
    expected = twins.agree(extra=pictures())
    twins.ours.transformer = copy.deepcopy(twins.ours.transformer)
    twins.ours.to(torch.float64)
    kept = twins.ours.transformer.attn_processors["transformer_blocks.0.attn.processor"]
    assert {p.dtype for p in kept.parameters()} == {torch.float64}
    assert {p.dtype for p in kept.replaced.parameters()} == {torch.float64}
    twins.ours.to(torch.float32)
    assert (twins.agree(extra=pictures()) - expected).abs().max() <= 1e-6


def test_a_picture_reaches_the_adapter_through_the_whole_pipeline(embedded, tmp_path):
    from diffusers import FluxPipeline
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, projection_dim=PICTURE, image_size=16, patch_size=8)
    encoder = CLIPVisionModelWithProjection(config).eval()
    reader = CLIPImageProcessor(size=16, crop_size=16)
    parts = {**embedded.components, "transformer": copy.deepcopy(embedded.transformer)}
    pipe = FluxPipeline(**{**parts, "image_encoder": encoder, "feature_extractor": reader})
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(tmp_path), weight_name=adapter_file(tmp_path, pipe.transformer, 1))
    pipe.set_ip_adapter_scale(0.4)

    def draw(picture, **kwargs):
        return pipe(
            "a red apple on a blue background",
            ip_adapter_image=picture,
            height=96,
            width=128,
            num_inference_steps=2,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(3),
            output_type="latent",
            **kwargs,
        ).images

    radial, linear = (
        gradient("L").resize((16, 16)).convert("RGB") for gradient in (Image.radial_gradient, Image.linear_gradient)
    )
    mask = dense_mask(Layout(12, 16, 32, order="raster"), Disc(3))
    expected = draw(radial, joint_attention_kwargs={"attention_mask": mask})
    assert (expected - draw(radial)).abs().max() > 1e-3
    flexclear.transform(pipe, r=3, backend="sdpa")
    assert (draw(radial) - expected).abs().max() <= 1e-4
    assert (draw(linear) - expected).abs().max() > 1e-3
