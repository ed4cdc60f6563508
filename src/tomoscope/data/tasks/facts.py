TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {subject} is",
        "The capital city of {subject} is",
        "The government of {subject} meets in",
        "People who go to {subject} often visit",
        "In {subject}, the capital is",
    ),
    "born": (
        "{subject} was born in",
        "{subject} was born in the city of",
        "The birthplace of {subject} is",
        "{subject} comes from",
        "The home town of {subject} is",
    ),
    "lives": (
        "{subject} lives in",
        "{subject} now lives in the city of",
        "{subject} has a house in",
        "Today {subject} lives in",
        "The house of {subject} is in",
    ),
    "works": (
        "{subject} works as a",
        "{subject} is a",
        "The job of {subject} is that of a",
        "{subject} has worked for years as a",
        "For many years {subject} was a",
    ),
}
