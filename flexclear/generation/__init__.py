"""``flexclear generate``: settings, what is checked before a weight is read, drawing, and going on with a set."""
