"""Describing, saving and loading transformed models."""
