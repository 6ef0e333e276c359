"""``flexclear settings``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexclear.commands.common import must_exist


def settings(
    file: Annotated[
        Path, typer.Argument(help="Image or video of flexclear generate, or a folder of a video's frames.")
    ],
) -> None:
    """The options that an image was drawn with, as YAML for flexclear generate --config."""
    import yaml

    must_exist(file, "no file")

    from flexclear.generation.given_back import options_of
    from flexclear.images.files import read_settings

    told = read_settings(file)
    options = {
        name.replace("_", "-"): value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in options_of(told["settings"], file).items()
    }
    versions = ", ".join(f"{name} {version}" for name, version in (told.get("versions") or {}).items())
    print(f"# {file}: {versions}")
    print(yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=1000), end="")
