"""Model families that ``transform`` knows: a declaration each, and a file for what is peculiar."""

from __future__ import annotations

from torch import nn

from flexclear.families.chroma import CHROMA
from flexclear.families.flux import FLUX
from flexclear.families.flux2 import FLUX2
from flexclear.families.qwen import QWEN
from flexclear.families.sd3 import SD3
from flexclear.families.zimage import ZIMAGE
from flexclear.runtime.checks import refuse_other_forward
from flexclear.runtime.facts import Call, Layer
from flexclear.runtime.family import Family

FAMILIES: tuple[Family, ...] = (FLUX, FLUX2, QWEN, SD3, CHROMA, ZIMAGE)


def family_of(model: nn.Module) -> Family:
    """The family of ``model``.

    Raises:
        TypeError: no family knows it, and the message lists those that exist; or it is of a subclass with a forward of its
            own, which may compute anything.
    """
    for family in FAMILIES:
        base = family.base_of(model)
        if base is not None:
            refuse_other_forward(model, "the model given", base)
            return family
    supported = ", ".join(family.model_class for family in FAMILIES)
    raise TypeError(f"{type(model).__name__} is not a model that flexclear can transform. Supported: {supported}")


__all__ = ["FAMILIES", "Call", "Family", "Layer", "family_of"]
