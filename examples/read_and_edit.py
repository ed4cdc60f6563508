"""Read a stream at a labelled place, then write to it in several ways, and see how far the answer moves.

Run it: python examples/read_and_edit.py [model]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tomoscope import EMBEDDED, Prompt, add, noise, open_model, project_out, replace, scale, zero


def main(model: str | Path = EMBEDDED) -> dict[str, float]:
    """Prints the KL divergence in nats of the next token's distribution under each edit; returns it by edit."""
    subject = open_model(model)
    prompt = Prompt.parse("When Mary and {giver:John} went to the store, {giver_again:John} gave a drink to")
    site = "layer.0.resid_post"
    acts = subject.read([prompt], site, at=["giver", "giver_again"])
    print(f"{subject}\n{site} at the two names: {acts.axes[site]} = {tuple(acts[site].shape)}")

    first = acts[site][:, 0]  # [batch, d_model]
    edits = {
        "nothing": [],
        "add half of it": [add(site, first, 0.5, at="giver_again")],
        "put the first name's stream at the second": [replace(site, first, at="giver_again")],
        "halve it": [scale(site, 0.5, at="giver_again")],
        "project its direction out": [project_out(site, first, at="giver_again")],
        "noise": [noise(site, 0.1, at="giver_again", seed=0)],
        "no attention in the next layer": [zero("layer.1.attn.out")],
    }
    # a stack of different edits runs as one batch: [stack, batch, vocab]
    logs = subject.run_stack([prompt], list(edits.values())).float().log_softmax(-1)
    moved = (logs[0].exp() * (logs[0] - logs)).sum(-1)[:, 0].tolist()
    for name, value in zip(edits, moved, strict=True):
        print(f"{max(value, 0.0):8.4f} nats   {name}")
    return dict(zip(edits, moved, strict=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
