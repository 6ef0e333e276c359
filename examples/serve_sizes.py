"""Serve requests of many sizes: compile everything before the first one, and log what is compiled later.

    python examples/serve_sizes.py --weights clear_local_16.safetensors --fp8        # FLUX.1-dev on a GPU
    python examples/serve_sizes.py --model embedded --r 8 --steps 4 --sizes 128x128 96x160

Each size has its own graphs, which prompts of every length share. ``optimize(dynamic=True)`` makes one set for all sizes.
"""

import argparse
import itertools
import logging
import time
from pathlib import Path

import flexclear
import torch
from diffusers import DiffusionPipeline

PROMPTS = [
    "a red apple on a blue background",
    "a small blue plane over the sea",
    "a lighthouse in a thunderstorm, oil on canvas, thick brush strokes, dramatic light from the left",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve requests of many sizes from one pipeline.")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id, pipeline folder or 'embedded'")
    parser.add_argument("--sizes", nargs="+", default=["1024x1024", "1536x1024", "2048x2048"], help="HEIGHTxWIDTH")
    parser.add_argument("--r", type=int, default=16, help="window radius in tokens")
    parser.add_argument("--weights", help="safetensors file distilled for this radius")
    parser.add_argument("--fp8", action="store_true", help="run the linear layers in FP8")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "sdpa"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("served"))
    args = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes]
    args.out.mkdir(parents=True, exist_ok=True)

    logging.basicConfig()
    logging.getLogger("flexclear").setLevel(logging.INFO)  # logs every size that compiles late, and what that cost

    on_gpu = torch.cuda.is_available()
    folder = flexclear.embedded.model_directory() if args.model == "embedded" else args.model
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
    pipe.to("cuda" if on_gpu else "cpu")
    pipe.set_progress_bar_config(disable=True)

    flexclear.transform(pipe, r=args.r, backend=args.backend)
    if args.weights:
        flexclear.load_weights(pipe, args.weights)
    height, width = max(sizes)
    print(flexclear.explain(pipe, height=height, width=width))

    started = time.perf_counter()
    flexclear.optimize(pipe, fp8=args.fp8, compile=not args.no_compile, sizes=sizes, progress=False)
    warmed = flexclear.compile.report()
    print(f"ready after {time.perf_counter() - started:.1f} s\n{warmed}")

    requests = itertools.islice(zip(itertools.cycle(PROMPTS), itertools.cycle(sizes)), args.requests)
    for number, (prompt, (height, width)) in enumerate(requests):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(number)
        image = pipe(prompt, height=height, width=width, num_inference_steps=args.steps, generator=generator).images[0]
        image.save(args.out / f"{number}.png")
        print(f"{number}.png: {height} x {width}, {time.perf_counter() - started:.2f} s")

    late = flexclear.compile.report().since(warmed)
    print(f"compiled while serving: {len(late.graphs)} graphs")  # 0: warm-up was complete
    if on_gpu:
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
