"""What tests share: small models and calls, references, processes, broken files."""
