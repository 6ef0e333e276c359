"""Compilation and low precision: attention that is always fused, blocks compiled once, eight-bit linears.

Depends on torch, torchao, and the blocks and lengths of ``flexclear.masks``. The passes have a fixed order: transform, weights,
LoRA, quantize, compile.
"""

from flexclear.compile.blocks import repeated_blocks
from flexclear.compile.checkpoint import load_quantized, save_quantized
from flexclear.compile.flex import UnfusedAttentionError, compiled_flex_attention, why_not_compiled
from flexclear.compile.quantize import QuantizationReport, quantize, sqnr, weight_bytes, why_kept
from flexclear.compile.recipes import RECIPES, runnable_recipes, why_not_recipe
from flexclear.compile.regional import MODES, compile_blocks, compile_whole, uncompile
from flexclear.compile.report import CompileReport, report
from flexclear.compile.warm import WarmStart, load_artifacts, save_artifacts

__all__ = [
    "MODES",
    "RECIPES",
    "CompileReport",
    "QuantizationReport",
    "UnfusedAttentionError",
    "WarmStart",
    "compile_blocks",
    "compile_whole",
    "compiled_flex_attention",
    "load_artifacts",
    "load_quantized",
    "quantize",
    "repeated_blocks",
    "report",
    "runnable_recipes",
    "save_artifacts",
    "save_quantized",
    "sqnr",
    "uncompile",
    "weight_bytes",
    "why_kept",
    "why_not_compiled",
    "why_not_recipe",
]
