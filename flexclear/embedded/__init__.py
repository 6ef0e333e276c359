"""A small trained text-to-image pipeline with FLUX.1's architecture, shipped with the package."""

from flexclear.common.shipped import model_directory
from flexclear.embedded.control import controlnet
from flexclear.embedded.loading import pipeline
from flexclear.embedded.vocabulary import background_names, emoji_names, held_out_pairs, unknown_words

__all__ = [
    "background_names",
    "controlnet",
    "emoji_names",
    "held_out_pairs",
    "model_directory",
    "pipeline",
    "unknown_words",
]
