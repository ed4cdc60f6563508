"""Where does the name travel? Patch the residual stream and every head on indirect object identification.

Run it: python examples/patch_ioi.py [model] [pairs]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tomoscope import EMBEDDED, TASKS, activation_patching, attribution_patching, open_model
from tomoscope.circuits import PatchGrid

PLACES = ["IO", "S1", "S2", "end"]


def main(model: str | Path = EMBEDDED, n: int | str = 32) -> PatchGrid:
    """Prints the share of the clean-corrupted gap that each patch restores; returns the grid of heads."""
    subject = open_model(model)
    pairs = TASKS["ioi"].make(subject.tokenizer, int(n), seed=0)
    print(f"{pairs[0].clean.text!r} against {pairs[0].corrupted.text!r}")
    stream = activation_patching(subject, pairs, part="resid_pre", positions=PLACES)
    print(f"logit difference: clean {float(stream.clean.mean()):.2f}, corrupted {float(stream.corrupted.mean()):.2f}")
    print("share of the gap restored by the stream into each layer\n         " + "".join(f"{p:>8}" for p in PLACES))
    for layer, row in enumerate(stream.normalised.tolist()):
        print(f"layer {layer:2d} " + "".join(f"{value:8.2f}" for value in row))

    heads = activation_patching(subject, pairs, part="attn.z", positions=["end"])
    linear = attribution_patching(subject, pairs, part="attn.z", positions=["end"])
    share, estimate = heads.normalised[:, 0], linear.normalised[:, 0]  # [layer, head]
    print("heads at the last token: restored, and the linear estimate of it")
    for flat in share.flatten().argsort(descending=True)[:5].tolist():
        layer, head = divmod(flat, share.shape[1])
        print(f"  {layer}.{head}: {float(share[layer, head]):6.2f}  {float(estimate[layer, head]):6.2f}")
    return heads


if __name__ == "__main__":
    main(*sys.argv[1:])
