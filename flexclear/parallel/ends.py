"""Where a session learns how calls, loops and decoding end: by interrupts, too, which torch's hooks do not see."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from flexclear.runtime.hooks import entry_hook_of

if TYPE_CHECKING:
    from flexclear.parallel.session import Session


@contextlib.contextmanager
def told(session: Session) -> Iterator[None]:
    """Let a session know of what ends a ``with`` block."""
    try:
        yield
    except BaseException as error:
        session.failed(error)
        raise


def session_of(model: nn.Module) -> Session | None:
    """The session that a model takes part in, or None."""
    entry = entry_hook_of(model)
    return None if entry is None else cast("Session | None", entry.parallel)


class _Call:
    """In place of a shared model's ``_call_impl``, which runs its hooks and its forward.

    torch calls hooks that are registered with ``always_call`` after an ``Exception`` alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Call:
        model = self._model()
        assert model is not None
        return _Call(memo.get(id(model), model))

    def __reduce__(self) -> Any:
        return getattr, (self._model(), "_call_impl")  # before the attributes are there, the class's own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        assert model is not None
        session = session_of(model)
        if session is None:
            return type(model)._call_impl(model, *args, **kwargs)
        with told(session):
            session.start()
            output = type(model)._call_impl(model, *args, **kwargs)
            session.end()
            return output


def watch_calls(model: nn.Module, session: Session) -> None:
    """Let a session know of how a model's calls begin and end, until it is closed."""
    put(model, "_call_impl", _Call(model), session)


def put(owner: Any, name: str, value: Any, session: Session) -> None:
    """Give an object an attribute of its own, until a session is closed."""
    before, held = {key: old for key, old in vars(owner).items() if key == name}, weakref.ref(owner)

    def take_back() -> None:
        there = held()
        if there is not None and vars(there).get(name) is value:
            del vars(there)[name]
            vars(there).update(before)

    vars(owner)[name] = value
    session.closing.callback(take_back)


class _Loop:
    """A progress bar, whose ``with`` block is a pipeline's denoising loop."""

    def __init__(self, bar: Any, session: Session) -> None:
        self._bar, self._session = bar, session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __iter__(self) -> Any:
        return iter(self._bar)

    def __enter__(self) -> Any:
        self._session.enter_loop()
        return self._bar.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Any:
        try:
            return self._bar.__exit__(kind, error, trace)
        finally:
            self._session.leave_loop(error)


def watch_loop(pipe: Any, session: Session) -> None:
    """Let a session know of how a pipeline's denoising loop ends, until it is closed.

    Every pipeline of diffusers has its loop in ``with self.progress_bar(...)``; others are left alone.
    """
    if not callable(getattr(type(pipe), "progress_bar", None)):
        return
    held, own = weakref.ref(pipe), vars(pipe).get("progress_bar")

    def progress_bar(*args: Any, **kwargs: Any) -> _Loop:
        there: Any = held()
        bar = type(there).progress_bar(there, *args, **kwargs) if own is None else own(*args, **kwargs)
        return _Loop(bar, session)

    put(pipe, "progress_bar", progress_bar, session)
