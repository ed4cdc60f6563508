"""Which parts wrote the answer, and which input tokens it rests on.

Run it: python examples/attribute_answer.py [model] [prompt]
"""

from __future__ import annotations

import sys
from pathlib import Path

from tomoscope import EMBEDDED, direct_logit_attribution, open_model
from tomoscope.observe import LogitAttribution, by_head, integrated_gradients


def main(
    model: str | Path = EMBEDDED, prompt: str = "When Mary and John went to the store, John gave"
) -> LogitAttribution:
    """Prints the logit difference of the two likeliest tokens by part, by head, and by input token."""
    subject = open_model(model)
    answer, wrong = subject.last_logits([prompt])[0].topk(2).indices.tolist()
    names = [subject.tokenizer.decode([token]) for token in (answer, wrong)]
    parts = direct_logit_attribution(subject, [prompt], [answer], [wrong])
    print(
        f"logit({names[0]!r}) - logit({names[1]!r}) = {float(parts.total[0]):.3f} (the parts' sum to {parts.error:.0e})"
    )
    for index in parts.values[:, 0].abs().argsort(descending=True)[:6].tolist():
        print(f"  {float(parts.values[index, 0]):8.3f}  {parts.names[index]}")

    heads = by_head(subject, [prompt], [answer], [wrong])
    layer, head = divmod(int(heads.values[..., 0].argmax()), heads.values.shape[1])
    print(f"the head that writes most: {heads.layers[layer]}.{head}, {float(heads.values[layer, head, 0]):.3f}")

    tokens = integrated_gradients(subject, [prompt], [answer], [wrong], steps=16)
    assert tokens.completeness_error is not None
    print(f"by input token (integrated gradients, incomplete by {float(tokens.completeness_error[0]):.3f})")
    for token, value in zip(tokens.tokens[0].tolist(), tokens.values[0].tolist(), strict=True):
        print(f"  {value:8.3f}  {subject.tokenizer.decode([token])!r}")
    return parts


if __name__ == "__main__":
    main(*sys.argv[1:])
