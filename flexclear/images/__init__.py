"""Images on disk: read safely, written whole, numbered, put side by side."""
