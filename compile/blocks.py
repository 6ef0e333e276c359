"""The repeated blocks of a transformer, which are compiled once for all, and whose linears are quantized."""

from __future__ import annotations

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of ``model`` in the order of the forward pass.

    These are modules of the classes that diffusers names (``_repeated_blocks``), and members of the model's own module lists
    whose class is a transformer block or wraps one (HiDream): the names may be missing (SD3), or may not include the blocks of
    a variant (image-to-video HunyuanVideo). If there are none, list members whose class is any block (CogVideoX).

    Raises:
        ValueError: no blocks are found.
    """
    names = set(getattr(model, "_repeated_blocks", None) or ())
    members = [member for child in model.children() if isinstance(child, nn.ModuleList) for member in child]
    listed = {type(block).__name__ for member in members for block in (member, *member.children())}
    names |= {name for name in listed if name.endswith("TransformerBlock")}
    if not names:
        names = {type(member).__name__ for member in members if type(member).__name__.endswith("Block")}
    found = [module for module in model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no repeated transformer blocks: neither _repeated_blocks nor a list of modules "
            "whose class ends in Block"
        )
    return found


def hook_inside(block: nn.Module) -> str | None:
    """A description of the hooks that diffusers or accelerate have put inside ``block``; None: there are none."""
    found = _hooked(block)
    return None if found is None else hook_on(found[1], found[0])


def hook_on(module: nn.Module, name: str) -> str | None:
    """A description of the hooks that diffusers or accelerate have put around the forward of ``module``; None: there are none."""
    own = vars(module)
    if "forward" not in own:
        return None
    hooks = list(getattr(own.get("_diffusers_hook"), "hooks", ()))
    hooks += [type(own["_hf_hook"]).__name__] if "_hf_hook" in own else []
    return f"a hook ({', '.join(hooks)}) is on {name}" if hooks else None


def _hooked(module: nn.Module) -> tuple[str, nn.Module] | None:
    # Runs in every call of every block, and named_modules() is slower.
    for name, child in module._modules.items():
        if child is not None:
            own = child.__dict__
            if "forward" in own and hook_on(child, name) is not None:
                return name, child
            if own["_modules"]:
                found = _hooked(child)
                if found is not None:
                    return f"{name}.{found[0]}", found[1]
    return None
