"""Nodes for ComfyUI: windows on the attention of FLUX, Qwen-Image and Wan. See docs/guide/comfyui.md.

ComfyUI loads this folder from its ``custom_nodes``. Nothing here imports or contains code of ComfyUI.
"""

try:
    import flexclear  # noqa: F401
except ImportError as error:
    raise ImportError(
        "these nodes need the package flexclear in ComfyUI's Python environment: pip install PATH, where PATH is the checkout "
        "that this folder comes from"
    ) from error

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
