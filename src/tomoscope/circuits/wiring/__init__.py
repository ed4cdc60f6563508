"""The model with any edges kept and the rest ablated: who writes, who reads, what replaces an ablated source."""

__all__: list[str] = []
