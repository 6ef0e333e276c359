"""``flexclear bench``: attention, a step and its memory at a model's shapes, dense and windowed, on the user's own machine."""
