"""The support table, ``docs/support.md``, from the contract: ``make support`` writes it.

Each cell is a test that runs over the family, or the error that refuses what was asked for, as it is raised.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import flexclear
from flexclear.families import family_of

from .row import ABILITIES, Row
from .shapes import Shape
from .table import ROWS

FILE = Path(__file__).parents[2] / "docs" / "support.md"

MUST = {
    "the window, exactly, over batches and rectangles": (
        "test_oracle.py",
        "test_a_transformed_model_equals_the_plain_one_under_the_dense_mask",
    ),
    "proportional attention": (
        "test_oracle.py",
        "test_proportional_attention_scales_the_scores_and_not_what_a_mask_adds",
    ),
    "bfloat16": (
        "test_oracle.py",
        "test_bfloat16_errs_no_more_than_the_plain_model_in_bfloat16",
    ),
    "sizes and texts that alternate": (
        "test_calls.py",
        "test_sizes_and_texts_alternate_and_come_back_to_the_same_bits",
    ),
    "training": (
        "test_calls.py",
        "test_training_has_the_gradients_of_the_dense_mask_with_and_without_checkpointing",
    ),
    "restore, bit for bit": (
        "test_calls.py",
        "test_restore_is_bit_identical_and_leaves_nothing_behind",
    ),
    "deep copies": (
        "test_calls.py",
        "test_a_deep_copy_is_transformed_and_restored_on_its_own",
    ),
    "pickling": (
        "test_calls.py",
        "test_a_pickled_model_is_windowed_and_can_be_restored",
    ),
    "threads": (
        "test_calls.py",
        "test_two_models_and_many_threads_do_not_mix",
    ),
    "compiled FlexAttention": (
        "test_compile.py",
        "test_compiled_flex_attention_of_every_kind_of_block_does_so_too",
    ),
    "compiled blocks, one graph for all sizes": (
        "test_compile.py",
        "test_blocks_compile_to_whole_graphs_that_serve_another_size",
    ),
}
"""What every family does, and the test that runs over all: file and function."""

MAY = {
    "references": (
        "test_oracle.py",
        "test_reference_images_are_further_grids_in_the_same_plane",
    ),
    "padding": (
        "test_oracle.py",
        "test_padded_text_is_masked_in_each_sample",
    ),
    "residuals": (
        "test_oracle.py",
        "test_controlnet_residuals_follow_the_token_order",
    ),
    "ntk": (
        "test_oracle.py",
        "test_an_ntk_factor_is_a_larger_base_of_the_rotary_frequencies",
    ),
    "ids": (
        "test_oracle.py",
        "test_positions_above_256_stay_exact_although_bfloat16_rounds_the_ids",
    ),
    "fuse": (
        "test_oracle.py",
        "test_fused_projections_are_windowed_whenever_they_were_fused",
    ),
    "ip-adapter": (
        "test_oracle.py",
        "test_an_ip_adapter_gives_what_it_gives_under_the_dense_mask",
    ),
    "pooled keys": (
        "test_oracle.py",
        "test_image_queries_alone_see_the_mean_of_each_cell",
    ),
    "formulas": (
        "../alternatives/test_formulas.py",
        "test_an_alternative_equals_its_float64_reference_and_differs_from_dense_attention",
    ),
    "checkpointing": (
        "test_compile.py",
        "test_checkpointed_blocks_compile_to_whole_graphs_with_the_gradients_of_the_dense_mask",
    ),
    "ranks": (
        "../parallel/test_two_processes.py",
        "test_a_shared_model_equals_the_plain_one_under_the_dense_mask",
    ),
}
"""What some do, see ``ABILITIES``, and the test that runs over those."""

REFUSES = ("test_refusals.py", "test_what_a_family_does_not_support_is_refused_by_name")

HEAD = """# What runs on which model

Made by `make support` from `tests/contract`, where the same tests run over every family: a small model of the real
diffusers class, transformed, against the plain one whose attention gets the dense boolean mask of the window. The last
column names the test; `make contract` runs all of them for all families, the test suite leaves out a few costly ones.

"""


def refusal(row: Row, ability: str) -> str:
    """What is said to whoever asks the family for it."""
    asked, model = row.refuses[ability], row.build()
    try:
        if asked.prepare is not None:
            asked.prepare(model)
        flexclear.transform(model, **row.frames, **({"r": 3} if asked.call or asked.afterwards else asked.transform))
        if asked.afterwards is not None:
            asked.afterwards(model)
        if asked.call is not None:
            shape = Shape(8, 6, 5)
            with torch.no_grad():
                model(**{**row.call(shape), **asked.call(shape)})
    except asked.error as error:
        return f"{type(error).__name__}: {error}".replace(type(model).__name__, "<its class>")
    raise AssertionError(f"{row.name} does not refuse {ability}")


def support() -> str:
    """The whole file."""
    titles = [row.title for row in ROWS]
    lines = [f"| | {' | '.join(titles)} | shown by |", f"|---|{'---|' * len(titles)}---|"]
    lines += [f"| {what} | {' | '.join('yes' for _ in ROWS)} | `{'::'.join(test)}` |" for what, test in MUST.items()]
    notes: dict[str, int] = {}

    def note(text: str) -> int:
        return notes.setdefault(text, len(notes) + 1)

    def cell(row: Row, ability: str) -> str:
        if ability in row.abilities:
            return "yes"
        if ability in row.lacks:
            return f"- ({note(row.lacks[ability][0].upper() + row.lacks[ability][1:] + '.')})"
        return f"raises ({note(f'`{refusal(row, ability)}`')})"

    for ability, what in ABILITIES.items():
        lines.append(f"| {what} | {' | '.join(cell(row, ability) for row in ROWS)} | `{'::'.join(MAY[ability])}` |")
    text = HEAD + "\n".join(lines) + f"\n\nWhat raises does so before any work (`{'::'.join(REFUSES)}`):\n\n"
    text += "\n".join(f"{number}. {said}" for said, number in notes.items()) + "\n\n## Models and pipelines\n\n"
    text += "Of each, the pipelines named run end to end in the tests, with rectangular sizes.\n\n"
    text += "| model class | text | pipelines | what holds |\n|---|---|---|---|\n"
    families = {(family := family_of(row.build())).model_class: family for row in ROWS}
    for family in families.values():
        pipelines = ", ".join(f"`{name}`" for name in family.pipelines)
        text += f"| `{family.model_class}` | {_text(family)} | {pipelines} | {family.notes} |\n"
    return text


def _text(family) -> str:
    """Where text is in attention's sequence."""
    if not family.joins:
        return "by cross-attention"
    return "first" if family.text_first else "last"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(support())
