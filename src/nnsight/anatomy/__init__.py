"""One set of names for what models of all architectures have."""
