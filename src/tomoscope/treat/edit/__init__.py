"""Editing facts: requests, second moments of keys, targets, ROME, MEMIT, AlphaEdit, fine-tuning, and their measures."""

__all__: list[str] = []
