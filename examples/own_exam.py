"""An exam of one's own: whether one head looks at the token before more than the other heads do.

Run it: python examples/own_exam.py [model] [folder for the run]        (the plan is own_protocol.toml)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from tomoscope import EMBEDDED, Finding, Ledger, open_model, scan_model
from tomoscope.exams import Context, Exam, Options, register
from tomoscope.findings import Control, DataNote, Rule, bootstrap_interval, figures, null_interval, sign_flip_test


class HeadOptions(Options):
    """Every option has a default and a description; the protocol and the command line check against them."""

    prompts: int = Field(32, ge=8, description="Prompts of random tokens.")
    length: int = Field(16, ge=4, description="Tokens of each.")


def run(context: Context) -> Iterator[Finding]:
    """Choose the head on one half of the prompts, measure it on the other."""
    shape = (context.options.prompts, context.options.length)
    prompts = context.rng("prompts").integers(0, context.subject.facts.d_vocab, shape).tolist()
    patterns = context.subject.read(prompts, "layer.*.attn.pattern").stack("layer.*.attn.pattern").float().numpy()
    scores = np.diagonal(patterns, offset=-1, axis1=3, axis2=4).mean(-1).transpose(1, 0, 2)  # [prompt, layer, head]
    chosen, measured = context.halves(len(scores))
    layer, head = np.unravel_index(scores[chosen].mean(0).argmax(), scores.shape[1:])
    grid, mine = scores[measured].mean(0), scores[measured, layer, head]
    others = np.delete(scores[measured].reshape(len(measured), -1), layer * grid.shape[1] + head, axis=1)
    yield context.claim(
        "head",
        f"Head {layer}.{head} looks at the token before more than the other heads do.",
        estimate=bootstrap_interval(mine, seed=context.seed_for("interval"), unit="attention"),
        controls=[Control(name="the other heads", estimate=null_interval(others.mean(0)))],
        p_value=sign_flip_test(mine - others.mean(1), seed=context.seed_for("test")),
        test="paired sign-flip test over prompts against the mean of the other heads",
        chosen_on=DataNote(name="random tokens, half A", n=len(chosen)),
        measured_on=DataNote(name="random tokens, half B", n=len(measured)),
        sites=[f"layer.{layer}.attn.pattern[head={head}]"],
        figures=[context.figure("heads", figures.heatmap(grid, title="Attention to the token before"))],
    )


EXAM = Exam(
    name="own.previous_token", title="A previous-token head", question="Does one head look at the token before?",
    run=run, rule=Rule(direction="greater", minimum=0.2), options=HeadOptions,
    method="Mean attention from each token to the one before it, on random tokens.",
)  # fmt: skip


def main(model: str | Path = EMBEDDED, out: str | Path = "runs/own-exam") -> Ledger:
    """Runs the protocol beside this file and prints each finding's verdict; returns the record."""
    register(EXAM)
    ledger = scan_model(open_model(model), out, protocol=Path(__file__).with_name("own_protocol.toml"))
    for finding in ledger.findings():
        print(f"{finding.verdict}: {finding.claim} {finding.reason}")
    return ledger


if __name__ == "__main__":
    main(*sys.argv[1:])
