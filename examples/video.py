"""Draw a video under windows over frames, rows and columns.

    python examples/video.py                                                    # Wan 2.1 14B, 81 frames of 720p
    python examples/video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 480x832 --frames 49

Weights that were not trained for a window change the video: draw the same seed with ``--dense`` and compare.
docs/distilling-videos.md explains how to train for one.
"""

import argparse

import flexclear
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import export_to_gif, export_to_video


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a video under windows.")
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-14B-Diffusers", help="hub id or pipeline folder")
    parser.add_argument("--prompt", default="a cat walks through fresh snow, close to the ground")
    parser.add_argument("--size", default="720x1280", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--r", type=int, default=16, help="window radius in tokens")
    parser.add_argument("--frame-radius", type=int, default=4, help="latent frames seen on either side")
    parser.add_argument("--dense", action="store_true", help="leave the model as it is")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument("--backend", default="auto", choices=["auto", "flex", "sdpa"])
    parser.add_argument("--out", default="video.gif", help="a .gif, or an .mp4 if imageio-ffmpeg is installed")
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))

    on_gpu = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.bfloat16 if on_gpu else torch.float32)
    pipe.vae.to(torch.float32)  # as Wan's authors do
    pipe.to("cuda" if on_gpu else "cpu")

    if not args.dense:
        flexclear.transform(pipe, r=args.r, frame_radius=args.frame_radius, backend=args.backend)
        print(flexclear.explain(pipe, height=height, width=width, num_frames=args.frames))

    frames = pipe(
        args.prompt,
        height=height,
        width=width,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
        output_type="pil",
    ).frames[0]
    if args.out.endswith(".gif"):
        export_to_gif(frames, args.out, fps=args.fps)
    else:
        export_to_video(frames, args.out, fps=args.fps)
    print(f"{args.out}: {len(frames)} frames of {height} x {width}")


if __name__ == "__main__":
    main()
