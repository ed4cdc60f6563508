"""Where is a fact recalled? Noise on the subject's tokens, then one clean state put back at a time.

Run it: python examples/trace_a_fact.py [model] [prompt]
The prompt marks its subject: "The {subject:Space Needle} is in the city of".
"""

from __future__ import annotations

import sys
from pathlib import Path

from tomoscope import EMBEDDED, Prompt, causal_trace, open_model
from tomoscope.circuits import Trace, noise_scale

FACT = "The capital of {subject:France} is"


def main(model: str | Path = EMBEDDED, marked: str = FACT, draws: int = 4) -> dict[str, Trace]:
    """Prints, for the stream, MLPs and attention, the place whose clean state restores most of the answer."""
    subject = open_model(model)
    prompt = Prompt.parse(marked)
    answer = int(subject.last_logits([prompt])[0].argmax())
    sigma = noise_scale(subject, [prompt])
    traces = {}
    for kind in ("hidden", "mlp", "attn"):
        window = max(1, subject.facts.n_layers // 3)
        trace = causal_trace(subject, prompt, answer, kind=kind, sigma=sigma, draws=draws, window=window)
        token, layer = divmod(int(trace.effect.argmax()), trace.effect.shape[1])
        if not traces:
            said = subject.tokenizer.decode([answer])
            print(f"p({said!r}) = {trace.clean:.3f}; with noise on the subject {float(trace.corrupted.mean()):.3f}")
        best = float(trace.effect[token, layer])
        print(f"{kind:>6}: layer {layer} at {trace.tokens[token]!r} gives back {best:.3f} (window {trace.window})")
        traces[kind] = trace
    return traces


if __name__ == "__main__":
    main(*sys.argv[1:])
