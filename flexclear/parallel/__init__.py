"""One image on several GPUs: each rank has a band of the token grid and exchanges borders with its neighbours.

>>> flexclear.transform(pipe, r=16)                     # doctest: +SKIP
>>> flexclear.parallel.enable(pipe)                     # doctest: +SKIP
>>> pipe("a small blue plane", height=8192, width=8192)     # on every rank: torchrun --nproc-per-node 8 script.py

All ranks run the same script with the same prompt and seed, and every rank gets the whole image. Paper section 3.4.
"""

from __future__ import annotations

from flexclear.parallel.dense import enable_dense
from flexclear.parallel.enabling import attach, disable, enable, sent_bytes
from flexclear.parallel.errors import ParallelError
from flexclear.parallel.group import leave

__all__ = ["ParallelError", "attach", "disable", "enable", "enable_dense", "leave", "sent_bytes"]
