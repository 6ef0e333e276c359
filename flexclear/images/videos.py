"""Videos on disk that contain their settings: animated GIF and folders of PNG frames with Pillow, MP4 with PyAV."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from PIL import Image

from flexclear.common.choices import VIDEO_FORMATS, check_choice
from flexclear.common.extras import require
from flexclear.images.files import FRAME, png_bytes, settings_text

FASTEST_GIF = 50
"""Maximum frames per second of a GIF: delays are in hundredths of a second, and programs show delays below two as ten."""


def check_video(kind: str, fps: float, frames: int | None = None) -> None:
    """Raise for a format that cannot be written here, or a frame rate that it does not support.

    Args:
        kind: one of ``flexclear.common.choices.VIDEO_FORMATS``.
        fps: frames per second.
        frames: number of frames, if known.

    Raises:
        ImportError: the format is MP4, and PyAV is not installed.
        ValueError: the format or the frame rate is not supported.
    """
    check_choice("--format", kind, VIDEO_FORMATS)
    if not 0 < fps <= 240:
        raise ValueError(f"--fps must be above 0 and at most 240, got {fps:g}")
    if kind == "gif" and fps > FASTEST_GIF:
        raise ValueError(
            f"--fps {fps:g}: a GIF has at most {FASTEST_GIF} frames per second; --format mp4 and png have no such limit"
        )
    if kind == "mp4":
        require("av", "an MP4 file")


def video_content(
    kind: str, frames: Sequence[Image.Image], fps: float, settings: Mapping[str, Any], versions: Mapping[str, str]
) -> bytes | dict[str, bytes]:
    """Encode a video as the bytes of a file, or (``"png"``) of a folder's files by name.

    Args:
        kind: one of ``flexclear.common.choices.VIDEO_FORMATS``.
        frames: RGB, of one size.
        fps: frames per second. GIF delays are hundredths of a second, and vary so that the clip's length is right.
        settings, versions: contents of the file for ``flexclear.images.files.read_settings``.

    Raises:
        ImportError, ValueError: see ``check_video``.
    """
    check_video(kind, fps)
    if kind == "png":
        return {
            FRAME.format(number): png_bytes(frame, {**settings, "frame": number}, versions)
            for number, frame in enumerate(frames, 1)
        }
    text = settings_text(settings, versions)
    return _gif(frames, fps, text) if kind == "gif" else _mp4(frames, fps, text)


def gif_delays(frames: int, fps: float) -> list[int]:
    """Milliseconds to show each frame of a GIF: whole hundredths of a second that add up to the clip's length.

    >>> gif_delays(4, 16)
    [60, 60, 70, 60]
    """
    ends = [round(100 * number / fps) for number in range(frames + 1)]
    return [10 * (end - begin) for begin, end in itertools.pairwise(ends)]


def _gif(frames: Sequence[Image.Image], fps: float, text: str) -> bytes:
    stream = io.BytesIO()
    # One palette per frame. Equal frames become one that is shown for as long as all of them.
    pictures = [frame.convert("RGB").quantize(256) for frame in frames]
    pictures[0].save(
        stream,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=gif_delays(len(pictures), fps) if len(pictures) > 1 else 10 * round(100 / fps),
        loop=0,
        comment=text.encode("ascii"),
        optimize=False,
    )
    return stream.getvalue()


def _mp4(frames: Sequence[Image.Image], fps: float, text: str) -> bytes:
    """H.264 with 4:2:0, which needs even sides: an odd side gets a copy of its last row or column."""
    import av

    width, height = frames[0].size
    size = (width + width % 2, height + height % 2)
    rate = Fraction(fps).limit_denominator(1001)
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        container.metadata["comment"] = text
        video: Any = container.add_stream("libx264", rate=rate, options={"crf": "17", "preset": "medium"})
        video.width, video.height = size
        video.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in video.encode(av.VideoFrame.from_image(_extended(frame.convert("RGB"), size))):
                container.mux(packet)
        for packet in video.encode():
            container.mux(packet)
    return stream.getvalue()


def _extended(frame: Image.Image, size: tuple[int, int]) -> Image.Image:
    if frame.size == size:
        return frame
    larger = Image.new("RGB", size)
    larger.paste(frame.crop((frame.width - 1, 0, frame.width, frame.height)).resize((1, size[1])), (size[0] - 1, 0))
    larger.paste(frame.crop((0, frame.height - 1, frame.width, frame.height)).resize((size[0], 1)), (0, size[1] - 1))
    larger.paste(frame, (0, 0))
    return larger
