"""Steer what a model writes with a difference of means, beside a random direction of the same length.

Run it: python examples/steer_generation.py [model] [strength]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tomoscope import EMBEDDED, add, open_model

WANTED = ["The girl was so happy.", "It was a wonderful day.", "Everyone laughed and sang."]
UNWANTED = ["The girl was so sad.", "It was a terrible day.", "Everyone cried and left."]


def main(model: str | Path = EMBEDDED, strength: float | str = 2.0) -> dict[str, str]:
    """Prints a continuation without edit, with the direction, and with a random direction of equal norm."""
    subject = open_model(model)
    site = f"layer.{subject.facts.n_layers // 2}.resid_post"
    wanted, unwanted = (subject.read(texts, site, at="last")[site].float().mean(0) for texts in (WANTED, UNWANTED))
    direction = wanted - unwanted  # [d_model]
    draw = torch.randn(direction.shape, generator=torch.Generator().manual_seed(0))
    random = draw / draw.norm() * direction.norm()

    written = {}
    for name, vector in (("no edit", None), ("steered", direction), ("random direction", random)):
        edits = [] if vector is None else [add(site, vector, float(strength))]
        written[name] = subject.generate(["Then the boy"], max_new_tokens=24, edits=edits)[0]
        print(f"{name:>16}: Then the boy | {written[name].strip()}")
    return written


if __name__ == "__main__":
    main(*sys.argv[1:])
