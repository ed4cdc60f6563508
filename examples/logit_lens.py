"""What would the model answer if it stopped at a layer? The logit lens on one prompt.

Run it: python examples/logit_lens.py [model] [prompt]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tomoscope import EMBEDDED, logit_lens, open_model
from tomoscope.observe import LensReading


def main(model: str | Path = EMBEDDED, prompt: str = "When Mary and John went to the store, John gave") -> LensReading:
    """Prints, for the stream before the first block and after each, its best token and its KL from the final answer."""
    subject = open_model(model)
    answer = int(subject.last_logits([prompt])[0].argmax())
    reading = logit_lens(subject, [prompt], answers=[answer])
    assert reading.answer_probability is not None
    print(f"{prompt!r} -> {subject.tokenizer.decode([answer])!r}")
    print("  KL (nats)  p(answer)  best token")
    for site, top, kl, p in zip(reading.sites, reading.top, reading.kl, reading.answer_probability, strict=True):
        token = subject.tokenizer.decode([int(top)])
        print(f"  {max(0.0, float(kl)):9.3f}  {float(p):9.3f}  {token!r:<16} {site}")
    return reading


if __name__ == "__main__":
    main(*sys.argv[1:])
