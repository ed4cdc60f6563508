"""Which heads look back to what came after the same token before? Head roles, each beside its control.

Run it: python examples/find_induction_heads.py [model]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tomoscope import EMBEDDED, open_model
from tomoscope.observe import HeadScores, attention_roles


def main(model: str | Path = EMBEDDED) -> dict[str, HeadScores]:
    """Prints the three best heads of each role, with the same head on random tokens that do not repeat."""
    subject = open_model(model)
    roles = attention_roles(subject, sequences=16, seed=0)
    for role, scores in roles.items():
        mean, control = scores.values.mean(-1), scores.control.mean(-1)  # [layer, head]
        print(f"{role.replace('_', ' ')} (mean attention, 0 to 1)")
        for flat in mean.flatten().argsort(descending=True)[:3].tolist():
            row, head = divmod(flat, mean.shape[1])
            score, chance = float(mean[row, head]), float(control[row, head])
            print(f"  head {scores.layers[row]}.{head}: {score:.3f}, control {chance:.3f}")
    return roles


if __name__ == "__main__":
    main(*sys.argv[1:])
