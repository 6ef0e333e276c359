"""The commands of ``flexclear``, one module each. They read arguments and print; other packages do the work."""
