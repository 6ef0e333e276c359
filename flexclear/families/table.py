"""The README's support table, from the families themselves: ``python -m flexclear.families.table``."""

from __future__ import annotations

from flexclear.families import FAMILIES, Family


def support_table() -> str:
    """A Markdown table of the models that ``transform`` knows, one row each."""
    rows = [
        "| model class | text | pipelines run in tests | what holds |",
        "|---|---|---|---|",
        *(_row(family) for family in FAMILIES),
    ]
    return "\n".join(rows)


def _row(family: Family) -> str:
    abilities = [family.notes]
    if family.pools:
        abilities.append("down-sampled keys")
    if not family.rope:
        abilities.append("no NTK factor (positions are not rotary)")
    text = "first" if family.text_first else "last"
    pipelines = ", ".join(f"`{name}`" for name in family.pipelines)
    return f"| `{family.model_class}` | {text} | {pipelines} | {'; '.join(abilities)} |"


if __name__ == "__main__":
    print(support_table())
