"""Checks of a model or a call that every family makes before any work."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flexclear.runtime.processors import is_ours


def diffusers_class(module: nn.Module) -> type[nn.Module] | None:
    """The first diffusers class among the classes of ``module``, or None if there is none."""
    return next(
        (
            base
            for base in type(module).__mro__
            if base.__module__.startswith("diffusers.") and issubclass(base, nn.Module)
        ),
        None,
    )


def refuse_other_forward(module: nn.Module, where: str, base: type[nn.Module] | None) -> None:
    """Raise if ``module`` is an instance of a subclass of ``base``, a diffusers class, that overrides forward.

    Windows are made for diffusers' own forward. Another may compute attention itself, or infer positions from the order of the
    tokens, which differs inside a transformed model. A subclass that does not override forward is treated as its base.

    Raises:
        TypeError: it is; ``where`` describes it in the message.
    """
    if base is not None and type(module).forward is not base.forward:
        raise TypeError(
            f"{where} is a {type(module).__name__}, which has a forward of its own in place of {base.__name__}'s: what it "
            f"computes is not known to flexclear. Use {base.__name__} itself, or a subclass that does not override forward"
        )


def attention_of(model: nn.Module, block: nn.Module, where: str, name: str, replaced: tuple[str, ...]) -> Any:
    """The attention module ``name`` of a block, after a check that flexclear can replace its processor.

    Args:
        model: the model, for messages.
        block: the block.
        where: the block's place in the model, such as ``transformer_blocks[0]``.
        name: attribute that holds the module, or a path to it.
        replaced: names of the processor classes that the family replaces, exactly these: a subclass may compute anything.

    Raises:
        ValueError: there is no such module.
        TypeError: its processor is of another class or computes no attention that could be replaced; or the module or the
            block is of a subclass that overrides forward.
    """
    around: list[Any] = [block]
    *wrapped, last = name.split(".")
    for part in wrapped:
        around.append(getattr(around[-1], part, None))
    attention: Any = getattr(around[-1], last, None)
    if not isinstance(attention, nn.Module) or not hasattr(attention, "processor"):
        raise ValueError(
            f"{where} of this {type(model).__name__} has no attention module named {name} (found "
            f"{type(attention).__name__}): not the blocks that this model has in diffusers"
        )
    for module in around:
        refuse_other_forward(module, where, diffusers_class(module))
    refuse_other_forward(attention, f"{where}.{name}", diffusers_class(attention))
    processor = attention.processor
    if is_ours(processor):
        return attention
    kind = type(processor)
    home = (diffusers_class(attention) or type(attention)).__module__.partition(".")[0]
    if kind.__name__ not in replaced or kind.__module__.partition(".")[0] != home:
        derived = any(base.__name__ in replaced for base in kind.__mro__)
        raise TypeError(
            f"{where}.{name} has a {kind.__name__}; flexclear replaces {' and '.join(replaced)}"
            f"{', not what derives from them' if derived else ''}. Unload the plugin that installed it, then transform"
        )
    return attention


def required_tensor(kwargs: dict[str, Any], name: str, model: nn.Module) -> Tensor:
    """The tensor argument ``name``.

    Raises:
        ValueError: it is missing or not a tensor.
    """
    value = kwargs.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"a transformed {type(model).__name__} needs {name} as a tensor, got {value!r}")
    return value


def required_mask(kwargs: dict[str, Any], name: str, text: str, model: nn.Module) -> Tensor:
    """The mask argument ``name``, ``[B, tokens]``, for the text in the argument ``text``.

    Raises:
        ValueError: one of them is missing, or the mask's shape does not match the text's.
    """
    mask, words = required_tensor(kwargs, name, model), required_tensor(kwargs, text, model)
    if mask.shape != words.shape[:2]:
        raise ValueError(
            f"{name} must be of shape {tuple(words.shape[:2])} (batch, text tokens), as {text} is, got {tuple(mask.shape)}"
        )
    return mask


def refuse_mask(attention_kwargs: dict[str, Any], where: str) -> None:
    """Raise if the caller passes an attention mask to the processors.

    Raises:
        ValueError: it does.
    """
    given = attention_kwargs.get("attention_mask")
    if given is not None:
        raise ValueError(
            f"{where} holds an attention_mask ({type(given).__name__} of shape {tuple(getattr(given, 'shape', ()))}), but "
            "flexclear makes the mask of a transformed model. Leave it out, or flexclear.restore(model) first"
        )
