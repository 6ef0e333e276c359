"""``flexclear generate``: settings, what is checked before a weight is read, drawing, and resuming a set."""
