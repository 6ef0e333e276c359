"""Weights trained for local attention: the released files for FLUX.1-dev, and flexclear's own.

>>> flexclear.load_weights(pipe, "clear_local_16.safetensors")      # doctest: +SKIP
"""

from flexclear.weights.load import LoadedWeights, load_weights
from flexclear.weights.save import save_weights

__all__ = ["LoadedWeights", "load_weights", "save_weights"]
