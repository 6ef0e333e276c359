"""Models that take packed tokens and position ids, for which a declaration is enough: LongCat-Image, Ovis-Image, Bria 3.2 and
FIBO."""

from __future__ import annotations

from flexclear.families.flux import STACKS
from flexclear.families.tokens import TokensFamily
from flexclear.runtime.grid import Axes

LONGCAT = TokensFamily(
    model_class="LongCatImageTransformer2DModel",
    processors=("LongCatImageAttnProcessor",),
    stacks=STACKS,
    carriers=("pos_embed",),
    axes=Axes(image=1, anywhere=True),  # text has index 0, and the image begins behind it
    pipelines=("LongCatImagePipeline", "LongCatImageEditPipeline"),
    notes="LongCat-Image and Edit, whose reference image is a further grid; text padding is attended to, as in diffusers",
)

OVIS = TokensFamily(
    model_class="OvisImageTransformer2DModel",
    processors=("OvisImageAttnProcessor",),
    stacks=STACKS,
    carriers=("pos_embed",),
    text_mask=True,
    pipelines=("OvisImagePipeline",),
    notes="text padding is attended to, as in diffusers",
)

BRIA = TokensFamily(
    model_class="BriaTransformer2DModel",
    processors=("BriaAttnProcessor",),
    stacks=STACKS,
    carriers=("pos_embed",),
    attention_kwargs="attention_kwargs",
    residuals=("controlnet_block_samples",),
    refused={"controlnet_single_block_samples": "diffusers adds them to other tokens than the image's. Leave them out"},
    latents_per_token=1,  # its pipelines count in pixels of a token
    pipelines=("BriaPipeline",),
    notes="Bria 3.2; text padding is attended to, as in diffusers",
)

FIBO = TokensFamily(
    model_class="BriaFiboTransformer2DModel",
    processors=("BriaFiboAttnProcessor", "BriaAttnProcessor"),
    stacks=STACKS,
    carriers=("pos_embed",),
    text_mask=True,
    latents_per_token=1,  # its pipelines count in pixels of a token
    pipelines=("BriaFiboPipeline", "BriaFiboEditPipeline"),
    notes="FIBO and FIBO Edit, whose reference images are further grids; padded text is masked",
)
