"""``flexclear play``: a local page on which a model draws images, dense and windowed side by side."""
