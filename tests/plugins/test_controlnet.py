"""ControlNets beside a transformed FLUX: one, several, a union, repeated residuals; and a ControlNet's own attention."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import flexclear
from flexclear.masks import Disc, Layout, dense_mask

HEIGHT, WIDTH, TEXT = 96, 128, 32


def control_model(pipe, seed, single=1, **config):
    """A FluxControlNetModel of one block each, random weights, for the embedded pipeline."""
    from diffusers import FluxControlNetModel

    torch.manual_seed(seed)
    sizes = {"num_layers": 1, "num_single_layers": single, **config}
    model = FluxControlNetModel.from_config({**pipe.transformer.config, **sizes}).eval()
    for name, parameter in model.named_parameters():
        # What diffusers begins at zero, so that an untrained ControlNet does nothing.
        if name.startswith(("controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def guided(embedded, control):
    from diffusers import FluxControlNetPipeline

    pipe = FluxControlNetPipeline(**embedded.components, controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures():
    shapes = (Image.radial_gradient("L"), Image.linear_gradient("L"))
    return [shape.resize((WIDTH, HEIGHT)).convert("RGB") for shape in shapes]


def draw(pipe, masked=False, **kwargs):
    """Latents after two steps; ``masked`` runs the stock transformer under the dense mask."""
    extra = {}
    if masked:
        layout = Layout(HEIGHT // 8, WIDTH // 8, TEXT, order="raster")
        extra["joint_attention_kwargs"] = {"attention_mask": dense_mask(layout, Disc(3))}
    return pipe(
        "a red apple on a blue background",
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=2,
        max_sequence_length=TEXT,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **kwargs,
        **extra,
    ).images


def check(pipe, without, **kwargs):
    """Transformed equals masked; the mask, and what is left out in ``without``, make a difference."""
    expected, dense = draw(pipe, masked=True, **kwargs), draw(pipe, **kwargs)
    other = draw(pipe, masked=True, **{**kwargs, **without})
    flexclear.transform(pipe, r=3, backend="sdpa")
    try:
        assert (draw(pipe, **kwargs) - expected).abs().max() <= 1e-4
    finally:
        flexclear.restore(pipe)
    assert (dense - expected).abs().max() > 1e-3, "the window makes no difference here"
    assert (other - expected).abs().max() > 1e-3, "the ControlNet makes no difference here"


@pytest.mark.parametrize("single", [0, 1])
def test_residuals_of_a_controlnet_follow_the_token_order(embedded, single):
    pipe = guided(embedded, control_model(embedded, 0, single))
    check(pipe, {"controlnet_conditioning_scale": 0.0}, control_image=pictures()[0], controlnet_conditioning_scale=0.8)


def test_residuals_of_two_controlnets_add_up_in_the_token_order(embedded):
    from diffusers import FluxMultiControlNetModel

    both = FluxMultiControlNetModel([control_model(embedded, 0), control_model(embedded, 1)])
    pipe = guided(embedded, both)
    scales = {"controlnet_conditioning_scale": [0.7, 0.5]}
    check(pipe, {"controlnet_conditioning_scale": [0.7, 0.0]}, control_image=pictures(), **scales)


def test_a_union_controlnet_is_told_its_mode(embedded):
    pipe = guided(embedded, control_model(embedded, 0, num_mode=3))
    check(pipe, {"control_mode": 0}, control_image=pictures()[0], control_mode=2)


def test_a_union_controlnet_takes_several_modes(embedded):
    from diffusers import FluxMultiControlNetModel

    pipe = guided(embedded, FluxMultiControlNetModel([control_model(embedded, 0, num_mode=3)]))
    scales = {"controlnet_conditioning_scale": [0.7, 0.5]}
    check(pipe, {"control_mode": [1, 1]}, control_image=pictures(), control_mode=[0, 2], **scales)


def test_repeated_residuals_follow_the_token_order(twins):
    generator = torch.Generator().manual_seed(5)
    residuals = [torch.randn(2, 9 * 13, 32, generator=generator) for _ in range(3)]
    twins.transform()
    plain = twins.agree()
    repeated = twins.agree(controlnet_block_samples=residuals[:2], controlnet_blocks_repeat=True)
    single = twins.agree(controlnet_block_samples=tuple(residuals[:1]), controlnet_single_block_samples=residuals[1:])
    assert (repeated - plain).abs().max() > 1e-2
    assert (single - repeated).abs().max() > 1e-2


def test_a_controlnet_itself_is_no_model_to_transform(embedded):
    with pytest.raises(TypeError, match="FluxControlNetModel"):
        flexclear.transform(control_model(embedded, 0))
