"""Is a circuit the behaviour? Faithfulness, completeness, minimality, controls; hypotheses stated and tested."""

__all__: list[str] = []
