"""Training of the embedded model: see ``python -m flexclear.embedded.train --help``."""
