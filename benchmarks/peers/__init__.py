"""Scripts that run a public reference implementation in an environment of its own; nothing here is imported."""
