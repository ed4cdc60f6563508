TEMPLATES: tuple[tuple[str, str], ...] = (
    ("The {thing} is {colour}.", "The colour of the {thing} is"),
    ("The {thing} was {colour}.", "What colour was the {thing}? It was"),
    ("Look at the {colour} {thing}.", "The {thing} is"),
)
