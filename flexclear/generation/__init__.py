"""``flexclear generate``: settings, checks before weights are read, drawing, and resuming a set."""
