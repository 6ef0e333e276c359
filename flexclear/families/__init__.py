"""The model families that ``transform`` supports: one declaration each, in its own file if a model needs special code."""

from __future__ import annotations

from torch import nn

from flexclear.families.chroma import CHROMA
from flexclear.families.cogvideox import COGVIDEOX
from flexclear.families.cosmos3 import COSMOS3
from flexclear.families.ernie_image import ERNIE_IMAGE
from flexclear.families.flux import FLUX
from flexclear.families.flux2 import FLUX2
from flexclear.families.flux3 import FLUX3
from flexclear.families.glm_image import GLM_IMAGE
from flexclear.families.hidream import HIDREAM
from flexclear.families.hunyuan_image import HUNYUAN_IMAGE
from flexclear.families.hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO15
from flexclear.families.krea2 import KREA2
from flexclear.families.latents import AURAFLOW, COGVIEW4, LatentsFamily
from flexclear.families.ltx import LTX, LTX2
from flexclear.families.lumina2 import LUMINA2
from flexclear.families.minimax_h3 import MINIMAX_H3
from flexclear.families.mochi import MOCHI
from flexclear.families.packed import BRIA, FIBO, LONGCAT, OVIS
from flexclear.families.qwen import QWEN
from flexclear.families.qwen21 import QWEN_IMAGE21
from flexclear.families.sd3 import SD3
from flexclear.families.tokens import TokensFamily
from flexclear.families.wan import SKYREELS_V2, WAN, WAN_VACE
from flexclear.families.zimage import ZIMAGE
from flexclear.runtime.checks import refuse_other_forward
from flexclear.runtime.facts import Call, Layer
from flexclear.runtime.family import Family

FAMILIES: list[Family] = [
    FLUX,
    FLUX2,
    QWEN,
    SD3,
    CHROMA,
    ZIMAGE,
    AURAFLOW,
    COGVIEW4,
    HUNYUAN_IMAGE,
    GLM_IMAGE,
    ERNIE_IMAGE,
    HIDREAM,
    LUMINA2,
    QWEN_IMAGE21,
    LONGCAT,
    OVIS,
    BRIA,
    FIBO,
    KREA2,
    FLUX3,
    WAN,
    WAN_VACE,
    SKYREELS_V2,
    LTX,
    LTX2,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO15,
    COGVIDEOX,
    MINIMAX_H3,
    COSMOS3,
    MOCHI,
]
"""All known families; ``register`` adds to them."""


def register(family: Family, *, replace: bool = False) -> Family:
    """Register a model class with ``flexclear.transform`` for this process.

    >>> from flexclear.families import TokensFamily, register
    >>> register(TokensFamily(                                              # doctest: +SKIP
    ...     model_class="MyTransformer2DModel",            # takes hidden_states, encoder_hidden_states, img_ids
    ...     processors=("MyAttnProcessor",),
    ...     stacks={"transformer_blocks": "attn"},
    ...     carriers=("pos_embed",),
    ... ))

    ``flexclear.testing.check_family`` checks whether the declaration is right.

    Args:
        family: the declaration: a ``TokensFamily`` for a model that takes tokens and position ids, a ``LatentsFamily`` for one
            that takes latents, or a ``Family`` with its own ``read`` and ``enter``.
        replace: whether to replace a family that is already registered for the class.

    Returns:
        ``family``.

    Raises:
        TypeError: it is not a ``Family``.
        ValueError: it names no processor, no stack of blocks or no carrier, or its class is already registered.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register takes a Family, such as TokensFamily(model_class=...), got {type(family).__name__}")
    for name in ("model_class", "processors", "stacks"):
        if not getattr(family, name):
            raise ValueError(f"a family needs {name}, got {getattr(family, name)!r}")
    if not family.carriers and family.carrier_argument is None:
        raise ValueError("a family needs carriers, or a carrier_argument")
    for name in ("processors", "carriers"):
        if isinstance(getattr(family, name), str):
            raise TypeError(f"{name} must be a tuple of names, got {getattr(family, name)!r}")
    known = next((number for number, other in enumerate(FAMILIES) if other.model_class == family.model_class), None)
    if known is None:
        FAMILIES.append(family)
    elif replace:
        FAMILIES[known] = family
    else:
        raise ValueError(f"{family.model_class} is already registered; register(family, replace=True) replaces it")
    return family


def family_of(model: nn.Module) -> Family:
    """The family of ``model``.

    Raises:
        TypeError: no family covers it (the message lists the supported classes), or it is a subclass that overrides forward and
            so may compute anything.
    """
    for family in FAMILIES:
        base = family.base_of(model)
        if base is not None:
            refuse_other_forward(model, "the model given", base)
            return family
    supported = ", ".join(family.model_class for family in FAMILIES)
    raise TypeError(f"{type(model).__name__} is not a model that flexclear can transform. Supported: {supported}")


__all__ = ["FAMILIES", "Call", "Family", "LatentsFamily", "Layer", "TokensFamily", "family_of", "register"]
