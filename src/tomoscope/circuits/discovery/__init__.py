"""Finding circuits: selection from scores, ACDC, learned masks."""
