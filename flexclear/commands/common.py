"""Options that every command has, and types of options that several share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from flexclear.commands.terminal import output
from flexclear.common.choices import check_finite

PANEL = "Output"


def finite(value: float | None) -> float | None:
    """Callback of an option whose value must be finite."""
    try:
        check_finite("it", value)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("it ")) from error
    return value


def must_exist(path: Path, what: str = "no folder") -> None:
    """Raise unless ``path`` exists.

    Raises:
        FileNotFoundError: it does not.
    """
    if not path.expanduser().exists():
        raise FileNotFoundError(f"{what} {path}")


def out_folder(out: Path, option: str = "--out") -> None:
    """Raise unless the folder ``out`` exists, or can be made as far as its path tells.

    Raises:
        ValueError: it is a file, is named like one, or a part of its path is one.
    """
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{option} must be a folder, {out} is a file")
    if not out.exists() and out.suffix.lower() in (".png", ".gif", ".mp4"):
        raise ValueError(f"{option} must be a folder, and {out} is named like a file")
    _inside_folders(out, option)


def out_file(out: Path, option: str) -> None:
    """Raise unless a file ``out`` can be written, as far as its path tells.

    Raises:
        ValueError: it is a folder, or a part of its path is a file.
    """
    if out.expanduser().is_dir():
        raise ValueError(f"{option} must be a file, {out} is a folder")
    _inside_folders(out.expanduser(), option)


def _inside_folders(out: Path, option: str) -> None:
    above = next((folder for folder in out.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise ValueError(f"{option} {out} cannot be written: {above} is a file")


def check_ray(address: str | None, actors: int | None) -> None:
    """Raise if ``--ray`` cannot be used, or if ``--ray-actors`` is given without it.

    Raises:
        ImportError: Ray is not installed.
        OSError: no cluster is there.
        ValueError: the address is invalid, or there is none.
    """
    if address is not None:
        from flexclear.cluster.connection import check_address

        check_address(address)
    elif actors is not None:
        raise ValueError(f"--ray-actors {actors} needs --ray")


Ray = Annotated[
    str | None,
    typer.Option(
        help="Many images on the GPUs of a Ray cluster: HOST:PORT of one that has this machine as a node, auto (find it), or "
        "local (the GPUs of this machine). Needs the extra ray."
    ),
]
RayActors = Annotated[
    int | None, typer.Option(min=1, help="With --ray: pipelines at once. Default: one per GPU; without GPUs, per node.")
]


def _show_version(asked: bool) -> None:
    if asked:
        import flexclear

        print(f"flexclear {flexclear.__version__}")
        raise typer.Exit


_OPTIONS: dict[str, Any] = {
    "quiet": Annotated[
        bool,
        typer.Option("--quiet", rich_help_panel=PANEL, help="No progress or remarks, only results and errors."),
    ],
    "verbose": Annotated[
        bool,
        typer.Option("--verbose", rich_help_panel=PANEL, help="Log what is done, and what other libraries report."),
    ],
    "debug": Annotated[bool, typer.Option("--debug", rich_help_panel=PANEL, help="Show the traceback of an error.")],
    "version": Annotated[
        bool,
        typer.Option(
            "--version", rich_help_panel=PANEL, help="Print the version.", callback=_show_version, is_eager=True
        ),
    ],
}


def _with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``command`` with the options that all commands have."""

    def run(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in _OPTIONS}
        output.ask(quiet=given["quiet"], verbose=given["verbose"], debug=given["debug"])
        try:
            return command(**arguments)
        except KeyboardInterrupt:
            output.say("interrupted")
            raise typer.Exit(130) from None

    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in _OPTIONS.items()
    ]
    run.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _nothing() -> None:
    """Callback of a group of commands, which itself does nothing."""


class Commands(typer.Typer):
    """A group of commands. It and each of its commands have ``--quiet``, ``--verbose``, ``--debug`` and ``--version``.

    Args:
        help: what the group is for.
        options: those of ``typer.Typer``.
    """

    def __init__(self, help: str, **options: Any) -> None:
        options = {"add_completion": False, **options}
        super().__init__(
            help=help,
            no_args_is_help=True,
            pretty_exceptions_enable=False,
            callback=_with_options(_nothing),
            **options,
        )

    def command(  # type: ignore[override]
        self, name: str | None = None, **options: Any
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        register = super().command(name, **options)

        def add(command: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_options(command))
            return command

        return add
