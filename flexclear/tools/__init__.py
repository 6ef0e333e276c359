"""Other tools of the command line: the demo, the doctor, the soak test."""
