"""What every family asks of a model or a call at the door."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flexclear.runtime.family import diffusers_class
from flexclear.runtime.processors import is_ours


def refuse_other_forward(module: nn.Module, where: str, base: type[nn.Module] | None) -> None:
    """Raise if ``module`` is of a subclass of ``base``, a class of diffusers, that has a forward of its own.

    Windows are made for what diffusers' own forward does: another may attend by itself, or read positions off the order of
    the tokens, which differs inside a transformed model. A subclass that leaves forward alone is what its base is.

    Raises:
        TypeError: it is; ``where`` says what it is in the message.
    """
    if base is not None and type(module).forward is not base.forward:
        raise TypeError(
            f"{where} is a {type(module).__name__}, which has a forward of its own in place of {base.__name__}'s: what it "
            f"computes is not known to flexclear. Use {base.__name__} itself, or a subclass that does not override forward"
        )


def attention_of(
    model: nn.Module, block: nn.Module, where: str, name: str, kind: type[nn.Module], replaced: tuple[type, ...]
) -> Any:
    """The attention module ``name`` of a block, once it is known that flexclear can replace its processor.

    Args:
        model: for messages.
        block: the block.
        where: its place in the model, such as ``transformer_blocks[0]``.
        name: of the attribute that holds the module.
        kind: class that it has in diffusers.
        replaced: the processors that the family replaces: these classes exactly, since a subclass may compute anything.

    Raises:
        ValueError: it is another module.
        TypeError: its processor is another; or it or the block is of a subclass with a forward of its own.
    """
    attention: Any = getattr(block, name, None)
    if not isinstance(attention, kind):
        raise ValueError(
            f"{where} of this {type(model).__name__} has no {kind.__name__} named {name} (found "
            f"{type(attention).__name__}): not the blocks that this model has in diffusers"
        )
    refuse_other_forward(block, where, diffusers_class(block))
    refuse_other_forward(attention, f"{where}.{name}", kind)
    processor = attention.processor
    if type(processor) not in replaced and not is_ours(processor):
        known = " and ".join(known.__name__ for known in replaced)
        derived = any(isinstance(processor, known) for known in replaced)
        raise TypeError(
            f"{where}.{name} has a {type(processor).__name__}; flexclear replaces {known}"
            f"{', not what derives from them' if derived else ''}. Unload the plugin that installed it, then transform"
        )
    return attention


def required_tensor(kwargs: dict[str, Any], name: str, model: nn.Module) -> Tensor:
    """The tensor argument ``name``.

    Raises:
        ValueError: it is missing or no tensor.
    """
    value = kwargs.get(name)
    if not isinstance(value, Tensor):
        raise ValueError(f"a transformed {type(model).__name__} needs {name} as a tensor, got {value!r}")
    return value


def refuse_mask(attention_kwargs: dict[str, Any], where: str) -> None:
    """Raise if the caller hands an attention mask to the processors.

    Raises:
        ValueError: it does.
    """
    given = attention_kwargs.get("attention_mask")
    if given is not None:
        raise ValueError(
            f"{where} holds an attention_mask ({type(given).__name__} of shape {tuple(getattr(given, 'shape', ()))}), but "
            "flexclear makes the mask of a transformed model. Leave it out, or flexclear.restore(model) first"
        )
