"""``flexclear eval run``: draw every variant's images, score them, fill the paper's tables."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flexclear.alternatives.names import named
from flexclear.common.choices import parse_size
from flexclear.common.fingerprints import fingerprint_files
from flexclear.common.metrics import METRICS, PAIRS, SETS, require_for_metrics
from flexclear.common.versions import versions
from flexclear.compile.files import whole_file
from flexclear.compile.undoing import numbers_as_before
from flexclear.convert import transform
from flexclear.evaluation.conditions import distance_to_condition
from flexclear.evaluation.config import EvalConfig, VariantConfig
from flexclear.evaluation.evaluate import STORE
from flexclear.evaluation.judge import Judge, OnProgress, Score
from flexclear.evaluation.networks import Networks
from flexclear.evaluation.pictures import pair_names, read_captions, read_folder, read_picture
from flexclear.evaluation.store import Store
from flexclear.evaluation.tables import COLUMNS, CONDITION, ITSELF, MODEL, PROMPTS, REAL, REFERENCE, TABLES, markdown
from flexclear.evaluation.views import check_sizes
from flexclear.explanation.model import explain_model
from flexclear.families import family_of
from flexclear.families.target import model_of, px_per_token
from flexclear.generation.check import choose_device
from flexclear.generation.generate import Setup, check, draw, load
from flexclear.generation.parsing import read_prompts
from flexclear.generation.settings import DENSE, GenerateSettings
from flexclear.images.files import Target, read_settings
from flexclear.images.folder_settings import keep_settings
from flexclear.images.reading import read_image
from flexclear.runtime.exchange import as_before
from flexclear.runtime.hooks import entry_hook_of
from flexclear.weights import keys, load_weights

SHEET_ROWS = 6


@dataclass(frozen=True)
class Run:
    """The result of ``run``.

    Attributes:
        config: the settings.
        scores: by variant and by column of ``COLUMNS``.
    """

    config: EvalConfig
    scores: Mapping[str, Mapping[str, Score]]

    def markdown(self) -> str:
        """The tables, and how their numbers were computed."""
        config = self.config
        values = {title: {column: score.value for column, score in row.items()} for title, row in self.scores.items()}
        parts = [
            f"Model: {config.model or 'images drawn elsewhere'}. Original: {config.reference_name}. "
            f"{max((s.pictures for row in self.scores.values() for s in row.values()), default=0)} images a row.\n"
        ]
        for number in config.tables:
            parts.append(f"## In the layout of Table {number} ({TABLES[number].title})\n")
            parts.append(markdown(TABLES[number], values, config.columns))
        notes = []
        for column in config.asked_columns():
            kind = METRICS.get(COLUMNS[column].metric or "")
            for told in dict.fromkeys(
                text
                for title, row in self.scores.items()
                if column in row
                for text in (row[column].note, row[column].reason and f"not computed: {row[column].reason}")
                if text
            ):
                notes.append(f"- {COLUMNS[column].title}: {told}.")
            if kind is not None:
                notes.append(f"- {COLUMNS[column].title}: {kind.rule}; {kind.sizes}.")
        return "\n".join([*parts, *notes]) + "\n"

    def write(self) -> tuple[Path, Path]:
        """Write ``results.json`` and ``results.md`` into the output folder; return their paths."""
        data, page = self.config.output / "results.json", self.config.output / "results.md"
        told = {
            "config": json.loads(json.dumps(asdict(self.config), default=str)),
            "versions": versions(),
            "scores": {
                title: {column: asdict(score) for column, score in row.items()} for title, row in self.scores.items()
            },
        }
        with whole_file(data) as beside:
            beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        with whole_file(page) as beside:
            beside.write_text(self.markdown(), encoding="utf-8")
        return data, page


def run(
    config: EvalConfig,
    *,
    say: Callable[[str], None] = lambda text: None,
    on_progress: OnProgress = lambda metric, done, total: None,
) -> Run:
    """Draw missing images, score all, and write ``results.json``, ``results.md`` and ``sheet.png``.

    The same call resumes where it was stopped.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ImportError: a column needs a package that is not installed.
        TypeError, ValueError: images are too small for one of ``columns``, a setting is invalid, or the output holds images with
            other settings.
    """
    config.check()
    asked = [metric for column in config.asked_columns() if (metric := COLUMNS[column].metric) is not None]
    require_for_metrics(asked)
    named_metrics = [metric for column in config.columns if (metric := COLUMNS[column].metric) is not None]
    for size in map(parse_size, config.sizes if config.drawn else ()):
        check_sizes(named_metrics, *size, "sizes has")
    flops = draw_variants(config, say, on_progress) if config.drawn else {}
    folders = {
        variant.name: read_folder(variant.pictures or picture_folder(config, variant)) for variant in config.variants
    }
    reference = folders[config.reference_name]
    store = Store(config.output / STORE)
    networks = Networks(config.networks, choose_device(config.device), config.download)

    def judge_of(title: str, size: tuple[int, int] | None = None) -> Judge:
        return Judge(
            networks,
            store,
            size,
            config.batch,
            lambda metric, done, total: on_progress(f"{title} {metric}", done, total),
        )

    scores: dict[str, dict[str, Score]] = {}
    for title, folder in folders.items():
        judge, row = judge_of(title), {}
        for column in config.asked_columns():
            metric, against = COLUMNS[column].metric, COLUMNS[column].against
            if against == REFERENCE and title == config.reference_name:
                continue
            if against == MODEL:
                row[column] = _of_model(column, flops.get(title), len(folder))
                continue
            assert metric is not None
            if against == REFERENCE and METRICS[metric].kind == PAIRS:
                names = pair_names(folder, reference)
                row[column] = judge.pairs(metric, {n: (folder.files[n], reference.files[n]) for n in names})
            elif against == REFERENCE:
                row[column] = judge.sets(metric, folder.files, reference.files)
            elif against == ITSELF:
                row[column] = judge.sets(metric, folder.files)
            elif against == PROMPTS:
                row[column] = _to_prompts(metric, folder, None if title in flops else config.prompts, judge)
            elif against == REAL:
                row[column] = _against_real(metric, folder, config, judge_of)
            elif against == CONDITION:
                row[column] = _to_condition(metric, folder, config)
        scores[title] = row
    store.close()
    found = Run(config, scores)
    found.write()
    _sheet(config, folders)
    return found


def picture_folder(config: EvalConfig, variant: VariantConfig) -> Path:
    """Folder for the images of a variant."""
    return config.output / "pictures" / variant.name


def _of_model(column: str, gflops: float | None, pictures: int) -> Score:
    reason = None if gflops is not None else "images drawn elsewhere do not say what they cost"
    return Score(column, gflops, pictures=pictures, reason=reason)


def _to_prompts(metric: str, folder: Any, prompts: Path | None, judge: Judge) -> Score:
    try:
        captions = read_captions(prompts, folder)
    except ValueError as error:
        return Score(metric, None, reason=str(error))
    return judge.texts(metric, {name: (folder.files[name], text) for name, text in captions.items()})


def _against_real(metric: str, folder: Any, config: EvalConfig, judge_of: Callable[..., Judge]) -> Score:
    if config.real is None:
        return Score(metric, None, reason="no real images are named (real: FOLDER)")
    real = read_folder(config.real)
    if METRICS[metric].kind == SETS:
        return judge_of("real").sets(metric, folder.files, real.files)
    if len(real) != len(folder):
        return Score(metric, None, reason=f"{len(real)} real images for {len(folder)} drawn ones; one each is needed")
    pairs = dict(zip(folder.files, zip(folder.files.values(), real.files.values(), strict=True), strict=True))
    first = read_picture(next(iter(folder.files.values())))
    # Photographs have their own sizes.
    return judge_of("real", (first.shape[1], first.shape[2])).pairs(metric, pairs)


def _to_condition(metric: str, folder: Any, config: EvalConfig) -> Score:
    if config.conditions is None or config.condition is None:
        return Score(metric, None, reason="no conditions are named (conditions: FOLDER, condition: KIND)")
    conditions = read_folder(config.conditions)
    names = pair_names(folder, conditions)
    each = {}
    for name in names:
        picture, condition = read_image(folder.files[name]), read_image(conditions.files[name])
        each[name] = distance_to_condition(picture, condition, config.condition)
    values = torch.tensor(list(each.values()), dtype=torch.float64)
    return Score(metric, float(values.mean()), float(values.std(correction=0)), len(each), each=each)


def draw_variants(
    config: EvalConfig, say: Callable[[str], None], on_progress: OnProgress = lambda metric, done, total: None
) -> dict[str, float]:
    """Draw the missing images; return each variant's mean GFLOPs of attention per layer.

    Raises:
        See ``run``.
    """
    assert config.model is not None
    assert config.prompts is not None
    base = GenerateSettings(
        model=config.model,
        prompts=read_prompts(config.prompts),
        out=config.output / "pictures",
        sizes=tuple(map(parse_size, config.sizes)),
        seeds=config.seeds,
        r=DENSE,
        steps=config.steps,
        guidance=config.guidance,
        text_len=config.text_len,
        dtype=config.dtype,
        device=config.device,
        backend=config.backend,
    )
    setup = check(base)
    identity = _model_identity(config.model, setup)
    wanted = list(itertools.product(base.prompts, base.sizes or (None,), base.seeds))
    for variant in config.drawn:
        _check_folder(config, variant, base, identity)
    pipe = load(base, setup, say)
    gflops = {}
    for variant in config.drawn:
        folder = picture_folder(config, variant)
        missing = [number for number in range(len(wanted)) if not (folder / f"{number:06d}.png").is_file()]
        on_progress(f"{variant.name} images", len(wanted) - len(missing), len(wanted))
        with as_variant(pipe, variant, config.backend):
            for done, number in enumerate(missing, len(wanted) - len(missing) + 1):
                prompt, size, seed = wanted[number]
                settings = replace(
                    base,
                    prompts=(prompt,),
                    sizes=() if size is None else (size,),
                    seeds=(seed,),
                    r=DENSE if variant.dense else None,
                    weights=None if variant.weights is None else str(variant.weights),
                )
                target = Target(folder / f"{number:06d}.png", is_file=True, overwrite=True)
                list(draw(pipe, settings, replace(setup, target=target)))
                on_progress(f"{variant.name} images", done, len(wanted))
            gflops[variant.name] = _gflops(pipe, read_settings(folder / "000000.png")["settings"])
    return gflops


def _model_identity(model: str, setup: Setup) -> str:
    """Distinguishes models. Those in folders also differ by their files, which change with further training."""
    return " ".join([model, *setup.fingerprints])


def _check_folder(config: EvalConfig, variant: VariantConfig, base: GenerateSettings, identity: str) -> None:
    """Raise if the variant's folder holds images with other settings; write its own settings into the folder."""
    left_out = ("out", "overwrite", "resume", "r", "weights")
    drawn = {name: value for name, value in asdict(base).items() if name not in left_out}
    weights = None
    if variant.weights is not None:
        weights = fingerprint_files(variant.weights.parent, [variant.weights])
    told = {"model": identity, "base": drawn, "variant": {**asdict(variant), "weights": weights}}
    keep_settings(picture_folder(config, variant), told, "Name another output, or delete that folder")


def _gflops(pipe: Any, settings: Mapping[str, Any]) -> float:
    """GFLOPs of attention per layer, averaged over layers, at the size in an image's settings."""
    model = model_of(pipe)
    text_len = 512 if settings["text_len"] is None else settings["text_len"]
    explained = explain_model(
        model,
        family_of(model),
        entry_hook_of(model),
        settings["height"],
        settings["width"],
        text_len,
        px_per_token(pipe),
    )
    return explained.flops / len(explained.layers) / 1e9


@contextlib.contextmanager
def as_variant(pipe: Any, variant: VariantConfig, backend: str = "auto") -> Iterator[None]:
    """Turn a dense pipeline into the variant inside the block, and restore it afterwards.

    Raises:
        TypeError, ValueError: the variant does not fit the model.
    """
    if variant.dense:
        yield
        return
    model = model_of(pipe)
    changed = {}
    if variant.weights is not None:
        changed = keys.projections(model, list(family_of(model).layers(model)))
    with numbers_as_before(changed.values()), as_before(model):
        options: dict[str, Any] = {"backend": backend}
        if variant.attention != "clear":
            options["attention"] = named(variant.attention, **variant.sizes)
        else:
            options |= {"r": 16 if variant.r is None else int(variant.r), "down_factor": variant.down_factor}
        if variant.weights is None or variant.r is not None or variant.attention != "clear":
            transform(pipe, **options)
        if variant.weights is not None:
            load_weights(pipe, variant.weights)
            if variant.r is not None:
                transform(pipe, **options)  # The file brings its own window; this restores the requested one.
            elif backend != "auto":
                entry = entry_hook_of(model)
                assert entry is not None
                transform(pipe, r=dict(entry.settings.windows.items()), backend=backend)
        yield


def _sheet(config: EvalConfig, folders: Mapping[str, Any]) -> None:
    """Write a contact sheet of the first images that all variants have."""
    from flexclear.images.sheet import contact_sheet

    names = [n for n in folders[config.reference_name].files if all(n in f.files for f in folders.values())][
        :SHEET_ROWS
    ]
    rows, labels = [], []
    for name in names:
        row = [read_image(folder.files[name]).convert("RGB") for folder in folders.values()]
        try:
            labels.append(str(read_settings(folders[config.reference_name].files[name])["settings"]["prompt"]))
        except (ValueError, KeyError):
            labels.append(name)
        rows.append(row)
    if rows:
        with whole_file(config.output / "sheet.png") as beside:
            contact_sheet(rows, labels, list(folders)).save(beside, format="PNG")
