"""How much each edge or node matters: exactly, or from gradients, for all of them at once."""

__all__: list[str] = []
