"""Every causal architecture of the installed transformers that can be built tiny: does it open, exactly?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.sweep import SweepEntry, sweep
from tomoscope.errors import TomoscopeError
from tomoscope.model import build_subject
from tomoscope.model.probe import unwrap


def judge(entry: SweepEntry) -> str:
    """'' if a built model opens, reads every site with bit-identical logits, and its residual identity holds."""
    assert entry.model is not None
    try:
        subject = build_subject(entry.model, name=entry.model_type)
    except TomoscopeError as error:
        return f"does not open: {error}"
    if subject.facts.unsolved:
        return f"residual identity unknown: {subject.facts.unsolved[0]}"
    if subject.facts.identity_error is None or subject.facts.identity_error > 1e-4:
        return f"residual identity off by {subject.facts.identity_error}"
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.manual_seed(0)
        plain = unwrap(entry.model(**inputs))[0]
        torch.manual_seed(0)
        names = [name for name, info in subject.sites().items() if info.available]
        try:
            read = subject.run(inputs, read=names).logits
        except TomoscopeError as error:
            return f"a site that was found could not be read: {error}"
    return "" if torch.equal(plain, read) else f"logits off by {float((plain - read).abs().max()):.2g}"


def verdicts() -> Iterator[tuple[str, str]]:
    """(model type, '' or what is wrong), for the types that could be built."""
    for entry in sweep():
        if entry.model is not None:
            yield entry.model_type, judge(entry)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nearly_every_causal_architecture_opens_exactly() -> None:
    found = dict(verdicts())
    bad = {name: reason for name, reason in found.items() if reason}
    print(f"{len(found) - len(bad)} of {len(found)} open exactly\n" + "\n".join(f"{n}: {r}" for n, r in bad.items()))
    assert len(found) >= 166
    assert len(found) - len(bad) >= 155, bad
