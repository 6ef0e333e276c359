"""Model families that ``transform`` knows; one file each."""

from __future__ import annotations

from torch import nn

from flexclear.families.checks import refuse_other_forward
from flexclear.families.chroma import ChromaFamily
from flexclear.families.flux import FluxFamily
from flexclear.families.flux2 import Flux2Family
from flexclear.families.qwen import QwenFamily
from flexclear.families.sd3 import SD3Family
from flexclear.families.zimage import ZImageFamily
from flexclear.runtime.facts import Call, Layer
from flexclear.runtime.family import Family, diffusers_class

FAMILIES: tuple[Family, ...] = (
    FluxFamily(),
    Flux2Family(),
    QwenFamily(),
    SD3Family(),
    ChromaFamily(),
    ZImageFamily(),
)


def family_of(model: nn.Module) -> Family:
    """The family of ``model``.

    Raises:
        TypeError: no family knows it, and the message lists those that exist; or it is of a subclass with a forward of its
            own, which may compute anything.
    """
    for family in FAMILIES:
        if family.matches(model):
            refuse_other_forward(model, "the model given", diffusers_class(model, family.model_class))
            return family
    supported = ", ".join(family.model_class for family in FAMILIES)
    raise TypeError(f"{type(model).__name__} is not a model that flexclear can transform. Supported: {supported}")


__all__ = ["FAMILIES", "Call", "Family", "Layer", "family_of"]
