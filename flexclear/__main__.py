"""``python -m flexclear``."""

from flexclear.cli import main

main()
