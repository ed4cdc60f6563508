"""Prompts, pairs, corpora and tasks."""
