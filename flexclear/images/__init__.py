"""Images on disk: safe reading, atomic writing, numbering, contact sheets."""
