"""The code of diffusers' own processors, with some names rebound in each call.

A name passed as an argument, instead of a changed global, leaves no state between calls, and Dynamo can follow it. diffusers'
modules are not changed.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

DISPATCH = "dispatch_attention_fn"
"""The diffusers function with which processors compute attention, unless they call torch's."""


def why_not_windowed(stock: type) -> str | None:
    """Why a class of processors cannot run under a window, or None."""
    code = getattr(vars(stock).get("__call__"), "__code__", None)
    if code is None or not {DISPATCH, "scaled_dot_product_attention"}.intersection(code.co_names):
        return (
            f"{stock.__name__} computes attention by neither {DISPATCH} nor scaled_dot_product_attention in its __call__, "
            "where flexclear would put its own"
        )
    return None


def with_attention_given(stock: type, unbuilt: tuple[str, ...] = ()) -> tuple[Callable[..., Any], dict[str, Any]]:
    """``stock.__call__`` with the names by which it calls attention as additional keywords, and what these names refer to in
    diffusers: its ``dispatch_attention_fn``, or ``torch.nn.functional``.

    The function is compiled from diffusers' own source, whose lines tracebacks show.

    Args:
        stock: class of a processor.
        unbuilt: names whose assignments are left out: masks that a plan replaces, and what they are made from.

    Raises:
        TypeError: it computes no attention there, it assigns nothing to such a name, or its source is not available.
    """
    reason = why_not_windowed(stock)
    if reason is not None:
        raise TypeError(reason)
    call: Any = stock.__call__
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(call)))
    except (OSError, SyntaxError) as error:
        raise TypeError(
            f"the source of {stock.__name__}.__call__, which is to run under a window, is not available: {error}"
        ) from None
    space = dict(call.__globals__)
    # Otherwise Dynamo would look names up in the module of that name.
    del space["__name__"]
    theirs = {name: space[name] for name in call.__code__.co_names if name == DISPATCH or space.get(name) is F}
    function = tree.body[0]
    function.body = _without(function.body, unbuilt, stock)
    function.decorator_list, function.returns = [], None
    arguments = function.args
    for argument in (*arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kwonlyargs += [ast.arg(name) for name in theirs]
    arguments.kw_defaults = [None for _ in arguments.kwonlyargs]
    ast.increment_lineno(tree, call.__code__.co_firstlineno - 1)
    exec(compile(ast.fix_missing_locations(tree), call.__code__.co_filename, "exec"), space)
    own: Any = space[function.name]
    own.__defaults__, own.__kwdefaults__ = call.__defaults__, call.__kwdefaults__
    return own, theirs


def _without(body: list[ast.stmt], names: tuple[str, ...], stock: type) -> list[ast.stmt]:
    """The statements that do not assign to any of ``names``.

    Raises:
        TypeError: no statement assigns to one of the names.
    """
    kept, found = [], set()
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        own = {target.id for target in targets if isinstance(target, ast.Name)}.intersection(names)
        found |= own
        if not own:
            kept.append(statement)
    missing = sorted(set(names) - found)
    if missing:
        raise TypeError(
            f"{stock.__name__}.__call__ assigns nothing to {' and '.join(missing)}, by which flexclear knows the mask that it "
            "need not build: another version of diffusers than it was written for"
        )
    return kept


def as_called(call: Any, run: Callable[..., Any], more: str) -> Any:
    """A function with the arguments of ``call`` and one additional keyword ``more``, None by default. It calls ``run`` with its
    first argument, a dictionary of the others, further keywords, and ``more``.

    diffusers' attention modules inspect a processor's signature in every call, and drop arguments that are not in it with a
    warning. Dynamo can trace this for a function that has these arguments, but not for one with an assigned signature.
    """
    parameters = [
        parameter.replace(
            annotation=parameter.empty, default=parameter.empty if parameter.default is parameter.empty else None
        )
        for parameter in inspect.signature(call).parameters.values()
        if parameter.kind is not parameter.VAR_POSITIONAL
    ]
    rest = [each for each in parameters if each.kind is each.VAR_KEYWORD]
    named = [each for each in parameters if each not in rest]
    added = inspect.Parameter(more, inspect.Parameter.KEYWORD_ONLY, default=None)
    given = ", ".join(f"{each.name!r}: {each.name}" for each in named[1:])
    text = (
        f"def __call__{inspect.Signature([*named, added, *rest])}:\n"
        f"    return run({named[0].name}, {{{given}}}, {rest[0].name if rest else '{}'}, {more})"
    )
    space = {"run": run}
    exec(text, space)
    made: Any = space["__call__"]
    made.__defaults__, made.__kwdefaults__ = call.__defaults__, {**(call.__kwdefaults__ or {}), more: None}
    return made
