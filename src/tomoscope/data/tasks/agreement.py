TEMPLATES: dict[str, tuple[str, ...]] = {
    "simple": ("The {subject}",),
    "preposition": (
        "The {subject} near the {attractor}",
        "The {subject} behind the {attractor}",
        "The {subject} with the {attractor}",
        "The {subject} beside the {attractor}",
    ),
    "clause": (
        "The {subject} that the {attractor} {relative}",
        "The {subject} that saw the {attractor}",
        "The {subject} that helped the {attractor}",
    ),
}
