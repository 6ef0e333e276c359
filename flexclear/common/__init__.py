"""Helpers that every part of flexclear may use. They use none of these parts, and do not import torch."""
