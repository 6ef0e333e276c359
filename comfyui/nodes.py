"""The nodes: a window for an image model, and one for a video model. Each returns a copy of the given model."""

from __future__ import annotations

from typing import Any

from flexclear.masks import Disc, Window, all_frames, cylinder

from .attention import windowed

STEPS = "Of the sampler's {} steps, how many attend to the whole image."


def _dense_steps(which: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": 0, "min": 0, "max": 10000, "tooltip": STEPS.format(which)}


class _Node:
    """What both nodes have in common."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"
    CATEGORY = "model/attention"
    OUTPUT_TOOLTIPS = ("The model with windows. The one that came in stays as it is.",)

    def _given(self, model: Any, window: Window, video: bool, dense_first: int, dense_last: int) -> tuple[Any]:
        return (windowed(model, window, video, (dense_first, dense_last)),)


class ImageWindow(_Node):
    """FLUX and Qwen-Image: each image token attends to the disc of image tokens around it, and to all text."""

    DESCRIPTION = (
        "Image tokens of FLUX and Qwen-Image attend to a disc around them and to all text: large images take less time."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        radius = {
            "default": 16,
            "min": 1,
            "max": 16384,
            "tooltip": "In tokens; a token of FLUX.1 and Qwen-Image is 16 x 16 pixels.",
        }
        return {
            "required": {"model": ("MODEL",), "radius": ("INT", radius)},
            "optional": {"dense_first": _dense_steps("first"), "dense_last": _dense_steps("last")},
        }

    def apply(self, model: Any, radius: int, dense_first: int = 0, dense_last: int = 0) -> tuple[Any]:
        """``model``, windowed.

        Raises:
            TypeError, ValueError: see ``windowed``.
        """
        return self._given(model, Disc(radius), False, dense_first, dense_last)


class VideoWindow(_Node):
    """Wan: each token attends to the disc around it in its own frame and in those nearby. Cross-attention is unchanged."""

    DESCRIPTION = (
        "Tokens of Wan attend to a disc around them, in their frame and in those nearby: long videos take less time."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        radius = {"default": 16, "min": 1, "max": 1024, "tooltip": "In tokens; a token of Wan is 16 x 16 pixels."}
        frames = {
            "default": 2,
            "min": -1,
            "max": 1023,
            "tooltip": "Frames of latents on either side that are seen, four of the video each; 0: its own alone; -1: all.",
        }
        return {
            "required": {"model": ("MODEL",), "radius": ("INT", radius), "frame_radius": ("INT", frames)},
            "optional": {"dense_first": _dense_steps("first"), "dense_last": _dense_steps("last")},
        }

    def apply(
        self, model: Any, radius: int, frame_radius: int, dense_first: int = 0, dense_last: int = 0
    ) -> tuple[Any]:
        """``model``, windowed.

        Raises:
            TypeError, ValueError: see ``windowed``.
        """
        window = all_frames(radius) if frame_radius == -1 else cylinder(radius, frame_radius)
        return self._given(model, window, True, dense_first, dense_last)


NODE_CLASS_MAPPINGS = {"FlexclearImageWindow": ImageWindow, "FlexclearVideoWindow": VideoWindow}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FlexclearImageWindow": "Window Attention (image)",
    "FlexclearVideoWindow": "Window Attention (video)",
}
