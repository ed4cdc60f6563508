"""What the scan says of the micro-world's model is true: each finding against a plain forward of transformers.

The oracle uses no code of tomoscope's but the tasks' prompts: eager attention weights, forward hooks, hidden states. So
that no exam escapes, every finding must be of an exam that is checked here, or listed with the place where it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoscope.data import TASKS
from tomoscope.model import EMBEDDED, open_model
from tomoscope.phantoms.world import corpus, shipped_world
from tomoscope.phantoms.world.tasks import TASKS as WORLD_TASKS
from tomoscope.scan import scan_model

ELSEWHERE = {
    "concepts.dead_layers": "it is of classifiers (tests/exams/test_dead_layers.py)",
    "facts.editing": "ROME and MEMIT equal the public reference (tests/treat/edit); edits are scored by hand there",
    "treat.removal": "a planted cause is found; the backdoored sibling is cured (tests/treat, tests/exams)",
    "treat.watch": "the backdoor is seen without its trigger, the healthy model is not accused (tests/exams)",
    "concepts.lies": "liar, sycophant and honest model are told apart (tests/exams/test_lying.py)",
    "concepts.probes": "its fits equal scikit-learn's (tests/concepts); known concepts are found (tests/exams)",
    "circuits.discovery": "a circuit run as a model equals rewired runs written out (tests/circuits)",
    "circuits.attribution_graphs": "without transcoders it measures nothing; with them see tests/exams",
    "circuits.causal_tracing": "its numbers equal the public reference's (tests/circuits)",
    "observe.tuned_lens": "a fit is not a fact of the model; its gain is checked in tests/observe",
    "features.labels": "rules are scored on the spot; planted sorts are confirmed (tests/exams)",
    "features.structure": "a dictionary is a fit; planted and denied in the superposition phantom (tests/exams)",
    "features.concepts": "F1 against a count by hand (tests/exams/test_dictionaries.py)",
    "circuits.patching linear": "it compares two methods, and says nothing of the model alone",
}
N = 48


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """A quick scan, as the command line makes it."""
    ledger = scan_model(open_model(EMBEDDED), tmp_path_factory.mktemp("scan"), protocol="quick")
    found = list(ledger.findings())
    assert len(found) > 25
    return found


@pytest.fixture(scope="module")
def plain():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, attn_implementation="eager").eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(EMBEDDED)


class Pairs:
    """A task's pairs as plain rows of token ids, grouped by nothing: one forward a pair, clear rather than fast."""

    def __init__(self, plain, name: str, *, seed: int = 123) -> None:
        tokenizer = plain[1]
        corruption = {"ioi": "flip"}.get(name)
        extra = {"corruption": corruption} if corruption else {}
        self.raw = (TASKS | WORLD_TASKS)[name].make(tokenizer, N, seed=seed, **extra)
        aligned = self.raw.encode(tokenizer)
        self.clean = [torch.tensor([list(ids)]) for ids in aligned.clean_ids]
        self.corrupted = [torch.tensor([list(ids)]) for ids in aligned.corrupted_ids]
        self.right, self.wrong = torch.from_numpy(aligned.answer_ids), torch.from_numpy(aligned.wrong_ids)
        self.tokenizer = tokenizer

    def score(self, i: int, logits: torch.Tensor) -> float:
        """How far the right answers lead: probabilities of all of them (years), or the logits of the best ones."""
        right, wrong = (ids[i][ids[i] >= 0] for ids in (self.right, self.wrong))
        if len(right) > 1:
            p = logits.softmax(-1)
            return float(p[right].sum() - p[wrong].sum())
        return float(logits[right].max() - logits[wrong].max())

    def position(self, i: int, label: str) -> int:
        """The last token of a labelled span."""
        prompt = self.raw[i].clean
        if label in ("last", "end"):
            return self.clean[i].shape[1] - 1
        end = prompt.spans[label][1]
        return len(self.tokenizer(prompt.text[:end]).input_ids) - 1


def task_of(finding) -> str:
    key = finding.id.split("/")[1]
    return next(name for name in sorted(TASKS | WORLD_TASKS, key=len, reverse=True) if key.startswith(name))


def head_of(finding) -> tuple[int, int]:
    layer, head = re.search(r"layer\.(\d+)\.attn\.\w+\[head=(\d+)\]", finding.sites[0]).groups()
    return int(layer), int(head)


def abilities(finding, plain) -> bool:
    """Fresh prompts, a plain forward: about the same share is right."""
    pairs = Pairs(plain, task_of(finding))
    right = [pairs.score(i, plain[0](ids).logits[0, -1]) > 0 for i, ids in enumerate(pairs.clean)]
    share, said = sum(right) / len(right), finding.estimate
    slack = 4 * (max(share * (1 - share), 0.02) / finding.estimate.n) ** 0.5
    high = finding.verdict != "confirmed" or share > 0.55
    return abs(share - said.value) < slack and high


def repeated(tokens: int, rows: int = 8, half: int = 24) -> torch.Tensor:
    row = torch.randint(1, tokens, (rows, half), generator=torch.Generator().manual_seed(5))
    return torch.cat([row, row], 1)


def head_roles(finding, plain) -> bool:
    """Eager attention weights on random tokens that repeat: the named head is among the three best of all."""
    role, model = finding.id.split("/")[1], plain[0]
    if role == "copying":
        return copies(finding, plain)
    if role == "name_mover":
        return moves_names(finding, plain)
    ids = repeated(model.config.vocab_size)
    half = ids.shape[1] // 2
    weights = torch.stack(model(ids, output_attentions=True).attentions)  # [layer, row, head, query, key]
    back = {"previous_token": 1, "duplicate_token": half, "induction": half - 1}[role]
    first = 1 if role == "previous_token" else half
    diagonal = torch.stack([weights[..., q, q - back] for q in range(first, 2 * half)]).mean((0, 2))  # [layer, head]
    layer, head = head_of(finding)
    rank = int((diagonal > diagonal[layer, head]).sum())
    near = abs(float(diagonal[layer, head]) - finding.estimate.value) < 0.25
    return (rank < 3 and near) == (finding.verdict == "confirmed") or finding.verdict != "confirmed"


def copies(finding, plain) -> bool:
    """The full OV circuit of the named head raises the token that it reads, more than it raises others."""
    model = plain[0]
    layer, head = head_of(finding)
    width = model.config.head_dim
    block, rows = model.model.layers[layer], slice(head * width, (head + 1) * width)
    embedded = block.input_layernorm(model.model.embed_tokens.weight[1:600])
    through = embedded @ block.self_attn.v_proj.weight[rows].T @ block.self_attn.o_proj.weight[:, rows].T
    logits = model.lm_head(through)
    own = logits.diagonal(1)
    return bool((own > logits.mean(-1)).float().mean() > 0.6) == (finding.verdict == "confirmed")


def moves_names(finding, plain) -> bool:
    """From the end of the prompt the named head attends to the right name more than to the wrong one."""
    pairs = Pairs(plain, "ioi")
    layer, head = head_of(finding)
    lead = []
    for i, ids in enumerate(pairs.clean):
        weights = plain[0](ids, output_attentions=True).attentions[layer][0, head, -1]
        lead.append(float(weights[pairs.position(i, "IO")] - weights[pairs.position(i, "S2")]))
    return sum(lead) > 0 or finding.verdict != "confirmed"


def formed(finding, plain) -> bool:
    """Hidden states of the micro-world's text through the final norm: about as many tokens decode to the last guess."""
    model, tokenizer = plain
    block = int(re.search(r"After block (\d+)", finding.claim)[1])
    documents = corpus(shipped_world(), seed="truth")
    pieces = tokenizer([next(documents) for _ in range(40)], add_special_tokens=False).input_ids
    ids = torch.tensor([token for piece in pieces for token in piece][:1_200]).reshape(-1, 120)
    output = model(ids, output_hidden_states=True)
    early = model.lm_head(model.model.norm(output.hidden_states[block + 1])).argmax(-1)
    share = float((early == output.logits.argmax(-1)).float().mean())
    return abs(share - finding.estimate.value) < 0.25


def captured(module, ids: torch.Tensor, model) -> torch.Tensor:
    """The input of a module during a plain forward."""
    kept = []
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    model(ids)
    handle.remove()
    return kept[0]


def direct(finding, plain) -> bool:
    """What the named head writes at the last token, through the final norm's scale, raises the right answer's lead."""
    model, pairs = plain[0], Pairs(plain, task_of(finding))
    layer, head = head_of(finding)
    width = model.config.head_dim
    effect = []
    for i, ids in enumerate(pairs.clean):
        o_proj = model.model.layers[layer].self_attn.o_proj
        z = captured(o_proj, ids, model)[0, -1]
        written = o_proj.weight[:, head * width : (head + 1) * width] @ z[head * width : (head + 1) * width]
        stream = captured(model.model.norm, ids, model)[0, -1]
        scale = (stream.pow(2).mean() + model.config.rms_norm_eps).rsqrt()
        logits = model.lm_head(written * scale * model.model.norm.weight)
        right, wrong = (table[i][table[i] >= 0] for table in (pairs.right, pairs.wrong))
        effect.append(float(logits[right].mean() - logits[wrong].mean()))
    return sum(effect) > 0 or finding.verdict != "confirmed"


def rests(finding, plain) -> bool:
    """Another token in the named place moves the answer's lead more than one in an unlabelled place does."""
    model, pairs = plain[0], Pairs(plain, task_of(finding))
    generator = torch.Generator().manual_seed(1)
    lost = {True: [], False: []}
    for i, ids in enumerate(pairs.clean):
        labelled = {pairs.position(i, label) for label in pairs.raw[i].clean.spans}
        other = [p for p in range(1, ids.shape[1] - 1) if p not in labelled]
        before = pairs.score(i, model(ids).logits[0, -1])
        for named, place in ((True, pairs.position(i, finding.positions)), (False, other[i % len(other)])):
            changed = ids.clone()
            changed[0, place] = torch.randint(1, model.config.vocab_size, (1,), generator=generator)
            lost[named].append(abs(before - pairs.score(i, model(changed).logits[0, -1])))
    return sum(lost[True]) > sum(lost[False]) or finding.verdict != "confirmed"


def carries(finding, plain) -> bool:
    """The clean run's head, MLP or stream put into the corrupted run by a hook brings the answer's lead up."""
    model, pairs = plain[0], Pairs(plain, task_of(finding))
    site = finding.sites[0]
    layer = int(re.search(r"layer\.(\d+)", site)[1])
    block, width = model.model.layers[layer], model.config.head_dim
    moved, gaps = [], []
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        place = pairs.position(i, finding.positions)
        if "attn" in site:
            head = head_of(finding)[1]
            module, part = block.self_attn.o_proj, slice(head * width, (head + 1) * width)
            source = captured(module, clean, model)[0, place, part]
        elif "mlp" in site:
            module, part = block.mlp.down_proj, slice(None)
            source = captured(module, clean, model)[0, place]
        else:
            return brings(finding, plain, pairs, layer)

        def put(_, args, place=place, part=part, source=source):
            args[0][0, place, part] = source

        low, high = (pairs.score(i, model(ids).logits[0, -1]) for ids in (corrupted, clean))
        handle = module.register_forward_pre_hook(put)
        patched = pairs.score(i, model(corrupted).logits[0, -1])
        handle.remove()
        moved.append(patched - low)
        gaps.append(high - low)
    share = sum(moved) / sum(gaps)
    return abs(share - finding.estimate.value) < 0.25 and (share > 0.02 or finding.verdict != "confirmed")


def brings(finding, plain, pairs: Pairs, layer: int) -> bool:
    """The clean stream at the last token brings more of the answer after the named block than before it."""
    model = plain[0]
    shares = []
    for at in (layer, layer + 1):
        moved, gaps = 0.0, 0.0
        for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
            low, high = (pairs.score(i, model(ids).logits[0, -1]) for ids in (corrupted, clean))
            if at == len(model.model.layers):
                patched = high
            else:
                states = model(clean, output_hidden_states=True).hidden_states[at][0, -1]
                handle = model.model.layers[at].register_forward_pre_hook(
                    lambda _, args, states=states: args[0][0].__setitem__(-1, states)
                )
                patched = pairs.score(i, model(corrupted).logits[0, -1])
                handle.remove()
            moved, gaps = moved + patched - low, gaps + high - low
        shares.append(moved / gaps)
    step = shares[1] - shares[0]
    return abs(step - finding.estimate.value) < 0.25 and (step > 0.05 or finding.verdict != "confirmed")


CHECKS: dict[str, Callable] = {
    "observe.abilities": abilities,
    "observe.head_roles": head_roles,
    "observe.logit_lens": formed,
    "observe.direct_attribution": direct,
    "observe.token_attribution": rests,
    "circuits.patching": carries,
}


def test_every_finding_agrees_with_a_plain_forward(findings, plain):
    wrong, checked = [], 0
    for finding in findings:
        if finding.verdict == "not measured":
            continue
        linear = finding.exam == "circuits.patching" and finding.id.endswith("_linear")
        if finding.exam in ELSEWHERE or linear:
            continue
        checked += 1
        if not CHECKS[finding.exam](finding, plain):
            wrong.append((finding.id, finding.verdict, finding.claim, finding.estimate.value))
    assert not wrong
    assert checked > 20


def test_the_report_knows_the_micro_world(findings):
    """What the world says: the model that was trained on it does its tasks, and is confirmed to."""
    verdicts = {finding.id: finding.verdict for finding in findings}
    for task in ("world_facts", "ioi", "induction", "agreement", "facts", "greater_than"):
        assert verdicts[f"observe.abilities/{task}"] == "confirmed", task
    roles = {finding.id.split("/")[1]: finding for finding in findings if finding.exam == "observe.head_roles"}
    assert roles["previous_token"].verdict == "confirmed"
    assert roles["induction"].verdict == "confirmed"
