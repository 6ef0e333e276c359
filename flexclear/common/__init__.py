"""Helpers that every part of flexclear may use, and that use none of those parts: nothing here imports torch."""
