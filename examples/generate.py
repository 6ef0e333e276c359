"""Draw one image under CLEAR's windows.

    python examples/generate.py --weights clear_local_16.safetensors            # FLUX.1-dev, 2048 px, on a GPU
    python examples/generate.py --model embedded --size 128x128 --r 8 --steps 16 --prompt "a red apple on a blue background"

The second line runs anywhere: ``embedded`` is the small model that ships with flexclear.
"""

import argparse

import flexclear
import torch
from diffusers import DiffusionPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw one image under CLEAR's windows.")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id, pipeline folder or 'embedded'")
    parser.add_argument("--prompt", default="a small blue plane over a snowy mountain range")
    parser.add_argument("--size", default="2048x2048", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--r", type=int, default=16, help="window radius in tokens")
    parser.add_argument("--weights", help="safetensors file distilled for this radius")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "sdpa"])
    parser.add_argument("--out", default="image.png")
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))

    on_gpu = torch.cuda.is_available()
    folder = flexclear.embedded.model_directory() if args.model == "embedded" else args.model
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16 if on_gpu else torch.float32)
    pipe.to("cuda" if on_gpu else "cpu")

    flexclear.transform(pipe, r=args.r, backend=args.backend)
    if args.weights:
        flexclear.load_weights(pipe, args.weights)

    generator = torch.Generator().manual_seed(args.seed)
    image = pipe(args.prompt, height=height, width=width, num_inference_steps=args.steps, generator=generator).images[0]
    image.save(args.out)
    print(f"{args.out}: {image.height} x {image.width}")


if __name__ == "__main__":
    main()
