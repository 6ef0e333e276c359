"""The repeated blocks of a transformer: what is compiled once for all of them, and what is quantised."""

from __future__ import annotations

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of ``model`` in the order of the forward pass.

    Where diffusers names their classes (``_repeated_blocks``), modules of these; elsewhere (SD3) the members of the
    model's own lists of modules whose class is a transformer block.

    Raises:
        ValueError: none is found.
    """
    names = set(getattr(model, "_repeated_blocks", None) or ())
    if not names:
        names = {
            type(block).__name__
            for child in model.children()
            if isinstance(child, nn.ModuleList)
            for block in child
            if type(block).__name__.endswith("TransformerBlock")
        }
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no repeated transformer blocks: neither _repeated_blocks nor a list of modules "
            "whose class ends in TransformerBlock"
        )
    return found
