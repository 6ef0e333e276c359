"""``flexclear play``: a page on this machine on which a model draws, dense beside windows."""
