"""Compilation: attention that is always fused. Knows torch only (and torchao, once it quantises)."""

from flexclear.compile.flex import UnfusedAttentionError, compiled_flex_attention, why_not_compiled

__all__ = ["UnfusedAttentionError", "compiled_flex_attention", "why_not_compiled"]
