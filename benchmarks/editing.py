"""Targets of edits: all facts of a batch at once on the end of the model, against one fact at a time on all of it.

Both run the search of MEMIT's z (Meng et al. 2023) with the same losses, steps and contexts on the same model: a GPT-2
of the small one's shape with random weights and the embedded model's tokenizer. One by one is what the papers' code
does: rows padded on the right, the whole model run with a hook, torch's Adam, all positions' logits. Its vectors are
compared with ours.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.common import tell
from tomoscope.exams.world_facts import world_requests
from tomoscope.model import EMBEDDED, Subject, open_model
from tomoscope.treat.edit.requests import EditRequest, target_ids
from tomoscope.treat.edit.targets import TargetSettings, find_targets

CONTEXTS = ("{}", *(f"{start} {{}}" for start in (
    "The sun was out.", "I heard that people like music.", "Therefore the guitar was sold.", "Because it was late.",
    "You can visit the city in the evening.",
)))  # fmt: skip
LAYER = 5
SETTINGS = TargetSettings(steps=20, clamp=0.75, stop=0.0)


def subject_of(width: int) -> Subject:
    """GPT-2 small's shape with random weights and a small vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=width, bos_token_id=0, eos_token_id=0)
    )
    return open_model(model.eval(), tokenizer=tokenizer)


def one_by_one(subject: Subject, request: EditRequest) -> torch.Tensor:
    """The papers' loop, written out."""
    model, tokenizer = subject.model, subject.tokenizer
    answer = target_ids(subject, request.labelled(), request.target_new)
    texts = [context.replace("{}", request.prompt, 1) for context in CONTEXTS] + ["{} is a"]
    rows, places = [], []
    for number, text in enumerate(texts):
        at = text.index("{}")
        whole = text.replace("{}", request.subject)
        coded = tokenizer(whole, return_offsets_mapping=True)
        end = at + len(request.subject)
        places.append(max(i for i, (low, high) in enumerate(coded["offset_mapping"]) if low < end and high > at))
        rows.append(coded["input_ids"] + (list(answer[:-1]) if number < len(CONTEXTS) else []))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    delta = torch.zeros(model.config.n_embd, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=SETTINGS.rate)
    stands: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, args: object, output: object) -> object:
        value = output[0] if isinstance(output, tuple) else output
        if not stands:
            stands.append(value[0, places[0]].detach().clone())
        value = value.clone()
        for row, place in enumerate(places):
            value[row, place] = value[row, place] + delta
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = model.transformer.h[LAYER].register_forward_hook(hook)
    usual = None
    for step in range(SETTINGS.steps):
        adam.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        said = logits.log_softmax(-1)
        loss = 0.0
        for row in range(len(CONTEXTS)):
            first = len(rows[row]) - len(answer)
            loss = loss - sum(said[row, first + i, token] for i, token in enumerate(answer)) / len(answer)
        now = said[-1, places[-1]]
        usual = now.detach() if usual is None else usual
        kept = SETTINGS.essence * (now.exp() * (now - usual)).sum()
        loss = loss / len(CONTEXTS) + kept + SETTINGS.decay * delta.norm() / stands[0].norm() ** 2
        if step == SETTINGS.steps - 1:
            break
        loss.backward()
        adam.step()
        limit = SETTINGS.clamp * stands[0].norm()
        with torch.no_grad():
            if delta.norm() > limit:
                delta.mul_(limit / delta.norm())
    handle.remove()
    return delta.detach()


def main(facts: int = 32, alone: int = 4, rounds: int = 2, width: int = 768) -> None:
    subject = subject_of(width)
    requests = world_requests(facts)
    for parameter in subject.model.parameters():
        parameter.requires_grad_(False)
    for _ in range(rounds):
        start, busy = time.perf_counter(), time.process_time()
        by_hand = [one_by_one(subject, one) for one in requests[:alone]]
        single = ((time.perf_counter() - start) / alone, (time.process_time() - busy) / alone)
        start, busy = time.perf_counter(), time.process_time()
        found = find_targets(subject, requests, LAYER, kind="block", contexts=CONTEXTS, settings=SETTINGS)
        together = ((time.perf_counter() - start) / facts, (time.process_time() - busy) / facts)
        gap = max(float((found.delta[i] - one).norm() / one.norm()) for i, one in enumerate(by_hand))
        tell(
            "editing", facts=facts, width=width, contexts=len(CONTEXTS), steps=SETTINGS.steps,
            modes=sorted(found.modes),
            seconds_a_fact_one_by_one=round(single[0], 3), seconds_a_fact_together=round(together[0], 3),
            times=round(single[0] / together[0], 1), times_in_processor_seconds=round(single[1] / together[1], 1),
            largest_difference=gap,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=32)
    parser.add_argument("--alone", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    given = parser.parse_args()
    main(given.facts, given.alone, given.rounds, given.width)
