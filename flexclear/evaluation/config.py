"""Settings of ``flexclear eval run``, a YAML file. Every mistake is reported before anything is drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexclear.alternatives.names import named
from flexclear.common.choices import parse_size
from flexclear.common.settings import build, check_values, check_whole, read_settings_file
from flexclear.evaluation.conditions import CONDITIONS
from flexclear.evaluation.networks import DEFAULTS
from flexclear.evaluation.tables import COLUMNS, TABLES
from flexclear.generation.parsing import parse_radius
from flexclear.generation.settings import DENSE
from flexclear.masks import Disc, Downsampled

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class VariantConfig:
    """One row of the tables.

    Attributes:
        name: name of the row and of its image folder: letters, digits, ``.``, ``_``, ``-``.
        r: window radius in tokens, or ``"dense"`` for the original model. None: the weights' own, or 16.
        down_factor: side of the pooled cells in tokens, or None.
        weights: file of distilled weights, or None.
        attention: ``"clear"``, or a name from ``flexclear.alternatives`` instead of CLEAR.
        sizes: that mechanism's sizes, such as ``size: 8``.
        pictures: a folder of images drawn elsewhere, named like those of the reference; then nothing is drawn.
    """

    name: str
    r: str | None = None
    down_factor: int | None = None
    weights: Path | None = None
    attention: str = "clear"
    sizes: dict[str, int] = field(default_factory=dict)
    pictures: Path | None = None

    @property
    def dense(self) -> bool:
        return self.r == DENSE

    def check(self) -> None:
        """Raises:
        TypeError, ValueError, FileNotFoundError: a setting makes no sense.
        """
        if NAME.fullmatch(self.name) is None:
            raise ValueError(f"variants: {self.name!r} must be a name of letters, digits, '.', '_' and '-'")
        where = f"variants: {self.name}: "
        clear = {"r": self.r, "down_factor": self.down_factor, "weights": self.weights}
        given = [name for name, value in clear.items() if value is not None]
        if self.attention != "clear":
            named(self.attention, **self.sizes)
            given = [name for name in given if name != "weights"]
            if given:
                raise ValueError(f"{where}{', '.join(given)} are for attention: clear; leave them out")
        elif self.sizes:
            raise ValueError(f"{where}sizes are for attention other than clear; got {self.sizes}")
        if self.r is not None:
            parse_radius(str(self.r))
        if self.dense and (self.down_factor is not None or self.weights is not None):
            raise ValueError(f"{where}r: dense is the plain model; leave down_factor and weights out")
        if self.down_factor is not None:
            Downsampled(Disc(1), self.down_factor)
        if self.pictures is not None and given:
            raise ValueError(f"{where}its images are already drawn; leave {', '.join(given)} out")
        if self.weights is not None and not self.weights.is_file():
            raise FileNotFoundError(f"{where}no file {self.weights}")


@dataclass(frozen=True)
class EvalConfig:
    """What to draw, what to compare it with, and which tables to fill.

    Attributes:
        output: folder for images and results.
        variants: the rows.
        model: pipeline folder, hub id or ``"embedded"``; None if all images are already drawn.
        prompts: text file with one prompt per line; None if all images are already drawn and contain their prompts.
        reference: name of the variant that the others are compared with; the first by default.
        tables: numbers of the paper's tables.
        columns: additional columns for every table.
        sizes: ``HEIGHTxWIDTH``; empty: the pipeline's own. seeds: noise seeds for each prompt and size.
        steps, guidance, text_len: None: the pipeline's own.
        dtype, device, backend: as in ``flexclear generate``.
        networks: locations of networks by name. download: whether CLIP and DINO may be downloaded.
        real: folder of real images, or None. LPIPS needs one for each image, in the order of names.
        conditions: folder of the conditions that a ControlNet was given, named like the images, or None.
        condition: the kind of these conditions.
        batch: images per batch in the networks.
    """

    output: Path
    variants: tuple[VariantConfig, ...]
    model: str | None = None
    prompts: Path | None = None
    reference: str | None = None
    tables: tuple[int, ...] = (2,)
    columns: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    guidance: float | None = None
    text_len: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    networks: dict[str, str] = field(default_factory=dict)
    download: bool = False
    real: Path | None = None
    conditions: Path | None = None
    condition: str | None = None
    batch: int = 16

    @property
    def reference_name(self) -> str:
        return self.variants[0].name if self.reference is None else self.reference

    @property
    def drawn(self) -> tuple[VariantConfig, ...]:
        """The variants whose images are drawn here."""
        return tuple(variant for variant in self.variants if variant.pictures is None)

    def asked_columns(self) -> tuple[str, ...]:
        """Every column of every table, once."""
        names = [name for number in self.tables for name in TABLES[number].columns]
        return tuple(dict.fromkeys([*names, *self.columns]))

    def check(self) -> None:
        """Raises:
        TypeError, ValueError, FileNotFoundError: a setting makes no sense.
        """
        check_values(self)
        if not self.variants:
            raise ValueError("variants is empty; name at least the plain model: {name: original, r: dense}")
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants must have different names, got {names}")
        for variant in self.variants:
            variant.check()
        if self.reference_name not in names:
            raise ValueError(f"reference must be one of the variants {names}, got {self.reference!r}")
        for number in self.tables:
            if number not in TABLES:
                raise ValueError(f"tables are {list(TABLES)}, got {number}")
        for column in self.columns:
            if column not in COLUMNS:
                raise ValueError(f"columns are {list(COLUMNS)}, got {column!r}")
        if not self.asked_columns():
            raise ValueError("tables and columns are empty, so there is nothing to measure")
        if self.drawn:
            for name in ("model", "prompts"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is missing: {self.drawn[0].name} is to be drawn")
        for text in self.sizes:
            parse_size(text)
        if not self.seeds:
            raise ValueError("seeds is empty, so there is nothing to draw")
        for index, seed in enumerate(self.seeds):
            check_whole(f"seeds[{index}]", seed, 0)
        for name in ("steps", "text_len", "batch"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, 1)
        unknown = [name for name in self.networks if name not in DEFAULTS]
        if unknown:
            raise ValueError(f"networks are {', '.join(DEFAULTS)}; got {', '.join(unknown)}")
        if (self.conditions is None) != (self.condition is None):
            raise ValueError("conditions, a folder, and condition, its kind, go together")
        if self.condition is not None and self.condition not in CONDITIONS:
            raise ValueError(f"condition must be one of {list(CONDITIONS)}, got {self.condition!r}")


def read_eval_config(path: str | Path) -> EvalConfig:
    """Read and check the settings of a YAML file. Relative paths in it are relative to the file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: it is not valid YAML, has unknown settings, lacks some, or one is invalid.
    """

    def made(found: Mapping[str, Any], folder: Path) -> EvalConfig:
        config = from_mapping(found, folder)
        config.check()
        return config

    return read_settings_file(path, made)


def from_mapping(found: Mapping[str, Any], folder: Path | None = None) -> EvalConfig:
    """Make unchecked settings from parsed YAML.

    Raises:
        TypeError, ValueError: settings are unknown, missing, or of another type.
    """
    known = dict(found)
    if isinstance(known.get("variants"), list):
        # A radius is a number or "dense", but a field has only one type.
        known["variants"] = [
            {**entry, "r": str(entry["r"])} if isinstance(entry, Mapping) and _whole(entry.get("r")) else entry
            for entry in known["variants"]
        ]
    config: EvalConfig = build(EvalConfig, known, "")
    if folder is None:
        return config
    places = {
        name: folder / value.expanduser()
        for name in ("output", "prompts", "real", "conditions")
        if (value := getattr(config, name)) is not None
    }
    variants = []
    for variant in config.variants:
        own = {
            name: folder / value.expanduser()
            for name in ("weights", "pictures")
            if (value := getattr(variant, name)) is not None
        }
        variants.append(replace(variant, **own))
    networks = {
        name: str(folder / Path(place).expanduser()) if place.startswith((".", "~", "/")) else place
        for name, place in config.networks.items()
    }
    model = config.model
    if model is not None and model.startswith((".", "~")):
        model = str(folder / Path(model).expanduser())
    return replace(config, variants=tuple(variants), networks=networks, model=model, **places)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
