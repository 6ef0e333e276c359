"""What eight-bit weights cost and save: SQNR of layers and model, PSNR of images, bytes of weights, peak memory.

Run ``python -m bench.quality.quantize``; it writes ``bench/results/quantize.json`` and ``quantize.md``. The model is the embedded
pipeline in bfloat16, whose linears are small: ``min_features`` is lowered for it. The last rows have the weights that ship for
the window, if any do: undistilled ones leave it undecided what to draw, and now and then rounding decides it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from torch import Tensor, nn

import flexclear
from flexclear import embedded
from flexclear.common.foreign import without_diffusers_warnings
from flexclear.common.shipped import students_directory
from flexclear.compile import RECIPES, quantize, sqnr, weight_bytes, why_not_recipe
from flexclear.embedded.evaluation import Request, generate, picture_psnr, trained_requests
from flexclear.embedded.fingerprint import students_fingerprint, teacher_fingerprint
from flexclear.embedded.students import file_name
from flexclear.embedded.vocabulary import Vocabulary, read_vocabulary

from bench.machine import RESULTS, facts, write_results

MIN_FEATURES = 128
NOT_MEASURED = "not measured"


class Tape:
    """One call of a transformer: its arguments and output, and what went into and came out of each linear."""

    def __init__(self) -> None:
        self.call: dict[str, Any] = {}
        self.output = torch.empty(0)
        self.layers: dict[str, tuple[Tensor, Tensor]] = {}

    def record(self, model: nn.Module, run: Callable[[], object]) -> None:
        """Record the last call that ``run`` makes."""

        def listen(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                self.layers[name] = (args[0].detach().clone(), output.detach().clone())

            return hook

        def of_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.call = {key: value.clone() if isinstance(value, Tensor) else value for key, value in kwargs.items()}

        def of_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.output = output[0].clone()

        named = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_hook(listen(name)) for name, module in named]
        handles.append(model.register_forward_pre_hook(of_call, with_kwargs=True, prepend=True))
        handles.append(model.register_forward_hook(of_output))
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()


@without_diffusers_warnings()
def main(
    pictures: Annotated[int, typer.Option(min=1, help="Images per recipe and window.")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 8,
    seed: Annotated[int, typer.Option(help="Chooses prompts and noise.")] = 1,
    radius: Annotated[int, typer.Option(min=1, help="Window of the transformed rows, in tokens.")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure every recipe that the device can run and write JSON and Markdown."""
    torch.set_num_threads(threads)
    place = torch.device(device)
    vocabulary = read_vocabulary(embedded.model_directory())
    requests = trained_requests(vocabulary, pictures, seed)
    rows: list[dict[str, Any]] = []
    ships = (students_directory() / file_name(radius)).is_file()
    for window, distilled in ((None, False), (radius, False), *[(radius, True)] * ships):
        pipe, bare = _pipeline(place, window, distilled)
        tape = Tape()
        tape.record(bare, lambda pipe=pipe: generate(pipe, vocabulary, requests[:1], 1))
        drawn, peak = _draw(pipe, vocabulary, requests, steps, place)
        size = weight_bytes(bare)
        kept = {"recipe": "bfloat16", "r": window, "distilled": distilled, "bytes_after": size, "bytes_before": size}
        rows.append({**kept, "peak": peak})
        del pipe, bare
        for recipe in RECIPES:
            obstacle = why_not_recipe(recipe, place)
            if obstacle is None:
                rows.append(_measure(recipe, window, distilled, place, vocabulary, requests, steps, tape, drawn))
                typer.echo(rows[-1])
            elif window is None:
                rows.append({"recipe": recipe, "r": None, "not_run": obstacle})
    about = facts(
        place,
        diffusers=diffusers.__version__,
        torchao=version("torchao"),
        teacher=teacher_fingerprint(),
        students=students_fingerprint(),
        pictures=pictures,
        steps=steps,
        seed=seed,
        min_features=MIN_FEATURES,
    )
    write_results("quantize", about, rows, _table(rows), output)
    typer.echo(_table(rows))


def _pipeline(device: torch.device, window: int | None, distilled: bool) -> tuple[Any, nn.Module]:
    pipe = embedded.pipeline(torch_dtype=torch.bfloat16, device=device)
    pipe.set_progress_bar_config(disable=True)
    if window is not None:
        flexclear.transform(pipe, r=window, backend="auto" if device.type == "cuda" else "sdpa")
        if distilled:
            flexclear.load_weights(pipe, "embedded", filename=file_name(window))
    return pipe, pipe.transformer


def _draw(
    pipe: Any, vocabulary: Vocabulary, requests: list[Request], steps: int, device: torch.device
) -> tuple[Tensor, int | None]:
    """The images, and the peak of allocated device memory while they are drawn."""
    if device.type != "cuda":
        return generate(pipe, vocabulary, requests, steps), None
    torch.cuda.reset_peak_memory_stats(device)
    drawn = generate(pipe, vocabulary, requests, steps)
    return drawn, torch.cuda.max_memory_allocated(device)


def _measure(
    recipe: str,
    window: int | None,
    distilled: bool,
    device: torch.device,
    vocabulary: Vocabulary,
    requests: list[Request],
    steps: int,
    tape: Tape,
    drawn: Tensor,
) -> dict[str, Any]:
    pipe, model = _pipeline(device, window, distilled)
    report = quantize(model, recipe, min_features=MIN_FEATURES)
    with torch.no_grad():
        levels = [
            sqnr(tape.layers[name][1], model.get_submodule(name)(tape.layers[name][0])) for name in report.quantized
        ]
        whole = sqnr(tape.output, model(**tape.call)[0])
    pictures, peak = _draw(pipe, vocabulary, requests, steps, device)
    psnr = picture_psnr(pictures, drawn)
    return {
        "recipe": recipe,
        "r": window,
        "distilled": distilled,
        "linears": len(report.quantized),
        "kept": len(report.kept),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "peak": peak,
        "sqnr_lowest": min(levels),
        "sqnr_median": torch.tensor(levels).median().item(),
        "sqnr_output": whole,
        "psnr_lowest": psnr.min().item(),
        "psnr_median": psnr.median().item(),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Eight-bit linears of the embedded pipeline, against bfloat16",
        "",
        "SQNR of each quantized linear on the activations of one call, and of the transformer's output in that call; PSNR "
        "of the images of the same seeds. Peak: allocated device memory while drawing (CPU: not measured).",
        "",
        "| recipe | window | linears | weights | peak | SQNR lowest layer | SQNR median layer | SQNR output "
        "| PSNR lowest | PSNR median |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "not_run" in row:
            continue
        window = "none" if row["r"] is None else f"r = {row['r']}{', distilled' * row['distilled']}"
        peak = NOT_MEASURED if row["peak"] is None else f"{row['peak'] / 2**20:.1f} MiB"
        measured = [
            f"{row[key]:.1f} dB" if key in row else ""
            for key in ("sqnr_lowest", "sqnr_median", "sqnr_output", "psnr_lowest", "psnr_median")
        ]
        lines.append(
            f"| {row['recipe']} | {window} | {row.get('linears', '')} | {row['bytes_after'] / 2**20:.2f} MiB | {peak} | "
            f"{' | '.join(measured)} |"
        )
    lines += ["", *(f"- Not run: `{row['recipe']}`: {row['not_run']}." for row in rows if "not_run" in row)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    typer.run(main)
