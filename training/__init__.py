"""What made the models that tomoscope ships: one command each, deterministic by seed."""
