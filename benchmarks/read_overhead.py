"""Reading all residual streams and MLP outputs against a plain transformers forward; gradients at 36 sites; opening."""

from __future__ import annotations

import time

import torch

from benchmarks.common import gpt2_small, interleaved, ratio, tell
from tomoscope.model import build_subject, zero


def main(rounds: int = 7) -> None:
    subject = gpt2_small()
    ids = torch.randint(0, 50257, (8, 128), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sites = ["layer.*.resid_pre", "layer.*.resid_post", "layer.*.mlp.out"]
    spread = ["layer.*.resid_post", "layer.*.mlp.out", "layer.*.attn.z"]

    def plain() -> None:
        with torch.no_grad():
            subject.model(**inputs)

    works = {
        "plain": plain,
        "read": lambda: subject.run(inputs, read=sites),
        "read_without_logits": lambda: subject.read(inputs, *sites),
        "patterns": lambda: subject.run(inputs, read=[*sites, "layer.*.attn.pattern"]),
        "zero_one_head": lambda: subject.run(inputs, edits=[zero("layer.5.attn.z[head=3]")]),
        "gradients": lambda: subject.gradients(inputs, lambda logits, batch: logits[:, -1, 5], spread),
    }
    times = interleaved(works, rounds=rounds)
    for name in works:
        tell(f"read_overhead.{name}", seconds=min(times[name]), ratio_to_plain=ratio(times, name, "plain"))
    with torch.no_grad():
        same = torch.equal(subject.run(inputs, read=sites).logits, subject.model(**inputs).logits)
    start = time.perf_counter()
    build_subject(subject.model)
    tell("read_overhead.open", seconds=time.perf_counter() - start, bit_identical=same)


if __name__ == "__main__":
    main()
