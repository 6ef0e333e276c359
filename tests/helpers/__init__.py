"""Code shared by tests: small models and calls, references, processes, broken files."""
