"""Single places put back or taken away: grids of heads and positions, paths, noise on a subject, estimates."""

__all__: list[str] = []
