"""Load the embedded model as a diffusers pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexclear.common.shipped import model_directory

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline

SAMPLE_SIZE = 32
"""Side of the default image in latents: 32 latents of 4 pixels make 128 pixels."""


def pipeline(torch_dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> FluxPipeline:
    """Return the embedded text-to-image pipeline, which draws 128 x 128 pixels unless told otherwise.

    Args:
        torch_dtype: the weights' data type; float32 when not given.
        device: where to put the parts; left on the CPU when not given.

    Raises:
        FileNotFoundError: the package was installed without the model folder.
    """
    import torch
    from diffusers import FluxPipeline

    from flexclear.common.foreign import from_pretrained

    folder = model_directory()
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: reinstall the package, or train it with python -m flexclear.embedded.train"
        )
    dtype = torch.float32 if torch_dtype is None else torch_dtype
    loaded: FluxPipeline = from_pretrained(FluxPipeline, folder, dtype, local_files_only=True)
    loaded.default_sample_size = SAMPLE_SIZE
    return loaded if device is None else loaded.to(device)
