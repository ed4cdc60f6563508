TEMPLATES: tuple[str, ...] = (
    "The {event} lasted from the year {start} to the year {century}",
    "The {event} went on from {start} to {century}",
)
