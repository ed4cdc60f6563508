TEMPLATES: tuple[str, ...] = (
    "So {name} is a really great friend, isn't",
    "Yesterday {name} was very tired because",
    "When {name} got home,",
    "The teacher said that {name} would come if",
    "After {name} went to the {place},",
    "I know that {name} is happy because",
)
