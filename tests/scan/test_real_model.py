"""An exam on a real (tiny, random) transformer, from the model's own weights to the report: every seam at once."""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from transformers import LlamaConfig, LlamaForCausalLM

from tomoscope.exams import Exam, Options
from tomoscope.exams.registry import Registry
from tomoscope.findings import Control, DataNote, Rule, bootstrap_interval, figures, null_interval, null_p_value
from tomoscope.model import open_model
from tomoscope.scan import parse_protocol, plan, run_scan, write_report


class PreviousTokenOptions(Options):
    prompts: int = Field(default=12, ge=8, description="Prompts of random tokens.")
    length: int = Field(default=10, ge=4, description="Tokens of each prompt.")


def needs_patterns(subject):
    patterns = [site for name, site in subject.sites().items() if name.endswith("attn.pattern")]
    return "" if any(site.available for site in patterns) else "the model gives no attention patterns"


def run_previous_token(context):
    options, rng = context.options, context.rng("prompts")
    prompts = rng.integers(0, context.subject.facts.d_vocab, (options.prompts, options.length)).tolist()
    patterns = context.subject.read(prompts, "layer.*.attn.pattern").stack("layer.*.attn.pattern").float().numpy()
    scores = np.diagonal(patterns, offset=-1, axis1=3, axis2=4).mean(-1).transpose(1, 0, 2)  # [prompt, layer, head]
    chosen, measured = context.halves(len(scores))
    layer, head = (int(i) for i in np.unravel_index(scores[chosen].mean(0).argmax(), scores.shape[1:]))
    average = scores[measured].mean(0)  # [layer, head]
    others = np.delete(average.ravel(), layer * average.shape[1] + head)
    grid = figures.heatmap(average, title="Attention to the previous token.", column_axis="head", scale="sequential")
    yield context.claim(
        "head",
        f"Head {layer}.{head} attends to the previous token more than the other heads do.",
        estimate=bootstrap_interval(scores[measured, layer, head], seed=context.seed_for("interval"), unit="attention"),
        controls=[Control(name="all other heads", estimate=null_interval(others))],
        p_value=null_p_value(average[layer, head], others),
        test="against all other heads",
        chosen_on=DataNote(name="random tokens, half A", n=len(chosen)),
        measured_on=DataNote(name="random tokens, half B", n=len(measured)),
        sites=[f"layer.{layer}.attn.pattern[head={head}]"],
        figures=[context.figure("grid", grid)],
    )


EXAM = Exam(
    name="example.previous_token",
    title="Previous-token head",
    question="Does one head look at the token before?",
    method="Mean attention from each token to the one before it, on random tokens.",
    rule=Rule(direction="greater", minimum=0.2),
    options=PreviousTokenOptions,
    applies=needs_patterns,
    run=run_previous_token,
)


def test_a_scan_of_a_real_model_with_no_such_head_does_not_find_one(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    subject = open_model(LlamaForCausalLM(config).eval())
    exams = Registry(modules=())
    exams.register(EXAM)
    protocol = parse_protocol('name = "t"\n[[exam]]\nname = "example.*"', where="t")
    runs = [run_scan(subject, protocol, plan(protocol, exams=exams), out=tmp_path / name) for name in ("one", "two")]
    (finding,) = runs[0].findings()
    assert finding.verdict in ("refuted", "inconclusive"), finding.reason
    assert runs[0].arrays(EXAM.name)["grid.values"].shape == (3, 4)
    model = runs[0].manifest.provenance.model
    assert model["facts"]["n_layers"] == 3
    assert len(model["hash"]) == 64
    assert (runs[0].folder / "findings.jsonl").read_bytes() == (runs[1].folder / "findings.jsonl").read_bytes()
    assert "Previous-token head" in write_report(runs[0]).read_text()
    with torch.no_grad():
        subject.model.lm_head.weight[0, 0] += 1
    third = run_scan(subject, protocol, plan(protocol, exams=exams), out=tmp_path / "three")
    assert third.manifest.provenance.model["hash"] != model["hash"]
