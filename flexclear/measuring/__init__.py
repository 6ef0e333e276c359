"""``flexclear bench``: attention, a step and its memory at a model's shapes, dense and windowed, on this machine."""
