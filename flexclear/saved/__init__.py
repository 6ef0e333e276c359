"""A transformed model saved, described, and loaded as it was."""
