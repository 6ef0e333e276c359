"""What every part of flexclear may use, and what uses none of them: nothing here imports torch."""
