"""The parts of docs/build.py: what reads the source, and what renders it."""
