"""Markdown and plots of bench/distillation/study.py, all from the JSON that it writes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.distillation.rows import ALL, BEFORE, FLOW, LONG, LONGER, PUBLISHED_SIDE, REAL, Comparison

COLOURS = (*(f"C{number}" for number in range(10)), "black")
NONE = "–"  # noqa: RUF001
STAGES = (BEFORE, FLOW, ALL)
COLUMNS = "PSNR, dB | SSIM | ST-LPIPS (AlexNet) | FD (EfficientNet-Lite0) | class score | retrieval, %"
EVEN = 0.3
"""dB; two single runs that are nearer to each other than this say nothing about what they differ in."""


def comparison_of(report: dict[str, Any]) -> Comparison:
    """The size that the study was made at."""
    return Comparison(report["settings"]["side"])


def value_of(report: dict[str, Any], row: str, stage: str, key: str) -> float | None:
    """A mean of ``Measured``; None where the run is missing or has diverged."""
    found = report["rows"].get(row, {}).get(stage, {})
    return found["measured"][key] if "measured" in found else None


def markdown(report: dict[str, Any]) -> str:
    """The whole report; what has not been run yet is named."""
    settings, about, size = report["settings"], report["facts"], comparison_of(report)
    lines = [
        "# Distilling the embedded model: CLEAR and what it is compared with",
        "",
        f"{'; '.join(report['machines'])}; diffusers {about['diffusers']}; {report['seconds'] / 60:.0f} minutes.",
        "",
        f"Teacher: the embedded model, {size.pixels} px, {size.side} x {size.side} image tokens and {size.text_len} text "
        f"tokens; windows are the published ones times {size.side}/{PUBLISHED_SIDE}. Every row was trained alike: "
        f"{settings['steps']} steps of {settings['batch_size']} out of "
        f"{settings['pictures']} images by the teacher, the same images, noise and noise levels (uniform) in the same "
        f"order, AdamW at {settings['learning_rate']:g} with warm-up and cosine decay. Measured on {settings['measured']} "
        f"images, {settings['denoising']} steps, of prompts and seeds that training had not: pairs that the teacher itself "
        "never saw together. Each cell: before training / L_flow alone / all losses.",
        "",
        f"| attention | MFLOPs per layer | of dense | {COLUMNS} |",
        "|---|" + "---:|" * 8,
    ]
    dense = report["dense_flops"]
    score, shares = f"{report['teacher']['score_lite0']:.2f}", f"{100 * report['teacher']['both']:.1f}"
    lines.append(f"| the teacher, dense | {dense / 1e6:.1f} | 100 % | | 1 | 0 | 0 | {score} | {shares} |")
    for row in comparison_of(report).rows:
        found = report["rows"].get(row.name, {})
        if not found.keys() & set(STAGES):
            continue
        cells = [
            " / ".join(_cell(found.get(stage), key, text) for stage in STAGES)
            for key, text in (
                ("psnr", "{:.1f}"),
                ("ssim", "{:.3f}"),
                ("stlpips_alex", "{:.3f}"),
                ("fd_lite0", "{:.2f}"),
                ("score_lite0", "{:.2f}"),
                ("both", "{:.1f}"),
            )
        ]
        own = report["flops"][row.name]
        lines.append(f"| {row.title} | {own / 1e6:.1f} | {100 * own / dense:.0f} % | {' | '.join(cells)} |")
    lines += [
        "",
        "PSNR, SSIM and ST-LPIPS (shift-tolerant LPIPS, arXiv 2207.13686) are means over the images, to the teacher's of the "
        "same prompts and seeds; FD is FID's formula over the features of EfficientNet-Lite0, of all images to all of the "
        "teacher's; the class score is the Inception score's over its probabilities. Less is nearer in ST-LPIPS and FD. None of "
        "these compares with a published LPIPS, FID or IS, which look through other networks, at more images. Retrieval: emoji "
        "and background are both the prompt's.",
        "",
    ]
    if report["missing"]:
        lines += [f"Missing so far ({len(report['missing'])}): {'; '.join(report['missing'])}.", ""]
    lines += ["## What the paper expects, and what came out", "", *[f"- {text}" for text in findings(report)], ""]
    lines += [
        "## Training curves",
        "",
        "![training and held-out losses of all rows](distillation-curves.png)",
        "",
        *_data(report),
        *_longer(report),
        *_few_steps(report),
        *_students(report),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cell(found: dict[str, Any] | None, key: str, text: str) -> str:
    if found is None:
        return NONE
    if "failed" in found:
        return "diverged"
    value = found["measured"][key]
    return text.format(100 * value if key == "both" else value)


def findings(report: dict[str, Any]) -> list[str]:
    """The paper's expectations as sentences that the numbers decide; those without numbers are left out."""

    def psnr(row: str, stage: str) -> float | None:
        return value_of(report, row, stage, "psnr")

    rows = comparison_of(report).rows
    titles = {row.name: row.title for row in rows}
    own = [row.name for row in rows if row.is_clear]
    discs = [row.name for row in sorted(rows, key=lambda row: row.options.get("r", 0)) if set(row.options) == {"r"}]
    first = rows[0]
    said = []

    def compared(what: str, names: list[str], before: str, after: str) -> None:
        pairs = {row: (psnr(row, before), psnr(row, after)) for row in names}
        known = {row: (a, b) for row, (a, b) in pairs.items() if a is not None and b is not None}
        if known:
            against = [titles[row] for row, (a, b) in known.items() if b <= a]
            fails = f"; not for {', '.join(against)}" if against else ""
            said.append(f"{what}: {len(known) - len(against)} of {len(known)}{fails}.")

    compared("Distillation with all losses brings CLEAR nearer to the teacher (PSNR)", own, BEFORE, ALL)
    others = [row.name for row in rows if not row.is_clear]
    compared("So it does with the other mechanisms", others, BEFORE, ALL)
    compared("All losses end nearer to the teacher than L_flow alone, CLEAR", own, FLOW, ALL)
    compared("The same, others", others, FLOW, ALL)
    levels = [(row, psnr(row, ALL)) for row in discs]
    known = [(row, level) for row, level in levels if level is not None]
    if len(known) > 1:
        rising = all(a[1] < b[1] for a, b in itertools.pairwise(known))
        numbers = ", ".join(f"{titles[row]}: {level:.1f} dB" for row, level in known)
        said.append(f"A larger radius is nearer to the teacher: {'yes' if rising else 'NO'} ({numbers}).")
    ranking = sorted(((psnr(row.name, ALL) or 0.0, row.name) for row in rows if psnr(row.name, ALL)), reverse=True)
    if any(name not in own for _, name in ranking) and any(name in own for _, name in ranking):
        order = ", ".join(f"{titles[name]} {level:.1f}" for level, name in ranking)
        leads = "yes" if ranking[0][1] in own else "NO"
        said.append(f"CLEAR leads after distillation (PSNR): {leads} ({order}).")
        best_other = next(level for level, name in ranking if name not in own)
        cost = report["flops"]
        rival = next(name for _, name in ranking if name not in own)
        equal = [name for level, name in ranking if name in own and cost[name] <= cost[rival] and level > best_other]
        said.append(
            f"At no more FLOPs than the best other ({titles[rival]}) it leads, too: "
            f"{'yes, ' + titles[equal[0]] if equal else 'NO'}."
        )
    drawn, other = psnr(first.name, ALL), psnr(first.name, REAL)
    if drawn is not None and other is not None:
        answer = "hardly a difference" if abs(drawn - other) < EVEN else "yes" if drawn > other else "NO"
        said.append(
            f"Self-generated images teach more than real ones: {answer} ({first.title}: {drawn:.1f} dB against "
            f"{other:.1f} dB)."
        )
    return said or ["Nothing to say yet."]


def _data(report: dict[str, Any]) -> list[str]:
    first = comparison_of(report).rows[0]
    found = report["rows"].get(first.name, {})
    if "measured" not in found.get(REAL, {}) or "measured" not in found.get(ALL, {}):
        return []
    lines = [
        "## Self-generated images against real ones",
        "",
        f"{first.title}, all losses, the same captions and budget. Real: the same scenes with drawings of another set of emoji, "
        "which the teacher never saw.",
        "",
        "![training losses on both sets](distillation-data.png)",
        "",
        f"| trained on | {COLUMNS} |",
        "|---|" + "---:|" * 6,
    ]
    for title, stage in (("self-generated", ALL), ("real", REAL)):
        lines.append(f"| {title} | {_line(found[stage]['measured'])} |")
    return [*lines, ""]


def _longer(report: dict[str, Any]) -> list[str]:
    lines = [
        "## Longer training",
        "",
        f"All losses, {LONGER} times as many steps, everything else the same.",
        "",
        f"| | steps | {COLUMNS} |",
        "|---|" + "---:|" * 7,
    ]
    known = False
    for row in comparison_of(report).long_rows:
        found = report["rows"].get(row.name, {})
        for stage, factor in ((ALL, 1), (LONG, LONGER)):
            if "measured" in found.get(LONG, {}) and "measured" in found.get(stage, {}):
                known = True
                steps = report["settings"]["steps"] * factor
                lines.append(f"| {row.title} | {steps} | {_line(found[stage]['measured'])} |")
    return [*lines, ""] if known else []


def _few_steps(report: dict[str, Any]) -> list[str]:
    found, settings = report.get("few_steps"), report["settings"]
    if not found or "model" not in found:
        return ["## Zero-shot transfer to a few-step model", "", f"Diverged: {found['failed']}", ""] if found else []
    few = settings["few_steps"]
    lines = [
        "## Zero-shot transfer to a few-step model",
        "",
        "As the paper's Table 4 puts weights trained for FLUX.1-dev into schnell. The stand-in for schnell: reflow "
        f"(arXiv 2209.03003), all weights of the teacher tuned for {settings['steps']} steps on its own pairs of noise and "
        f"image; drawn in {few} steps. It was not made by schnell's adversarial recipe. The attention weights are those "
        f"distilled for the many-step teacher, put in as they are.",
        "",
        f"| {few} steps | reference | {COLUMNS} |",
        "|---|---|" + "---:|" * 6,
        f"| the many-step teacher, dense | itself at {settings['denoising']} steps | {_line(found['teacher'])} |",
        f"| the few-step model, dense | the teacher at {settings['denoising']} steps | {_line(found['model'])} |",
    ]
    for row in comparison_of(report).rows:
        for stage, title in ((BEFORE, "its own weights"), (ALL, "the weights distilled for the teacher")):
            measured = found["rows"].get(row.name, {}).get(stage)
            if measured:
                lines.append(f"| {row.title}, {title} | the few-step model, dense | {_line(measured)} |")
    return [*lines, ""]


def _students(report: dict[str, Any]) -> list[str]:
    found = report.get("students")
    if not found:
        return []
    total = sum(student["bytes"] for student in found)
    listed = "; ".join(
        f"`{student['file']}` ({student['stage']}, {student['psnr']:.1f} dB)"
        for student in sorted(found, key=lambda student: -student["psnr"])
    )
    return [
        "## Students",
        "",
        f"The best one of each CLEAR window, bfloat16, in the released format, {total / 1e6:.2f} MB together, best first: "
        f"{listed}.",
        "",
    ]


def _line(measured: dict[str, Any]) -> str:
    return (
        f"{measured['psnr']:.1f} | {measured['ssim']:.3f} | {measured['stlpips_alex']:.3f} | {measured['fd_lite0']:.2f} | "
        f"{measured['score_lite0']:.2f} | {100 * measured['both']:.1f}"
    )


def plot_curves(report: dict[str, Any], path: Path) -> None:
    """Training loss L_flow of every row with all losses, and L_pred on held-out images (the paper's Figure 11)."""
    series = [
        (row.title, report["rows"][row.name][ALL], "-" if row.is_clear else "--")
        for row in comparison_of(report).rows
        if "curve" in report["rows"].get(row.name, {}).get(ALL, {})
    ]

    def draw(axes: Any) -> None:
        for number, (title, run, style) in enumerate(series):
            look = {"linewidth": 1.3, "color": COLOURS[number]}
            axes[0].plot(run["curve"]["step"], run["curve"]["flow"], style, label=title, **look)
            axes[1].plot(
                [record["step"] for record in run["held_out"]],
                [record["prediction"] for record in run["held_out"]],
                style,
                marker=".",
                **look,
            )
        axes[0].set_title("training, all losses: L_flow")
        axes[0].set_yscale("log")
        axes[1].set_title("held-out images: L_pred")
        axes[1].set_yscale("log")
        if series:
            axes[0].figure.legend(loc="outside lower center", ncols=4, fontsize=8)

    _figure(path, draw)


def plot_data(report: dict[str, Any], path: Path) -> None:
    """Training losses of one row on self-generated and on real images (the paper's Figure 10)."""
    first = comparison_of(report).rows[0]
    found = report["rows"].get(first.name, {})

    def draw(axes: Any) -> None:
        for stage, title in ((ALL, "self-generated"), (REAL, "real")):
            curve = found[stage]["curve"]
            axes[0].plot(curve["step"], curve["loss"], label=title)
            axes[1].plot(curve["step"], curve["prediction"], label=title)
        axes[0].set_title(f"{first.title}, training: all losses together")
        axes[1].set_title("training: L_pred")
        axes[1].set_yscale("log")
        axes[0].legend()

    if "curve" in found.get(ALL, {}) and "curve" in found.get(REAL, {}):
        _figure(path, draw)


def _figure(path: Path, draw: Callable[[Any], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    draw(axes)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path)
