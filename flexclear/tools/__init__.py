"""What the command line runs besides: the demo, the doctor, the soak test."""
