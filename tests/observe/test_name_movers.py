"""Name movers: attention, copying and controls by plain loops over transformers' own modules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.observe.raw import LAYOUTS, captured, subject_of
from tests.zoo import ZOO
from tomoscope.errors import DataError
from tomoscope.observe import name_movers

NAMES = [11, 17, 23, 31, 47]


def pairs_of(count: int) -> SimpleNamespace:
    """Prompts of unequal length: filler, the answer and the wrong name, the wrong name again, filler."""
    generator = torch.Generator().manual_seed(0)
    clean, answers, wrong = [], [], []
    for index in range(count):
        first, second = NAMES[index % 5], NAMES[(index + 2) % 5]
        filler = torch.randint(50, 96, (4 + index % 3,), generator=generator).tolist()
        order = [first, filler[0], second] if index % 2 else [second, filler[0], first]
        clean.append((filler[1], *order, *filler[2:], second, filler[0]))
        answers.append([first])
        wrong.append([second])
    return SimpleNamespace(clean_ids=clean, answer_ids=torch.tensor(answers), wrong_ids=torch.tensor(wrong))


@pytest.mark.parametrize("name", ["gpt2", "llama", "granite"])
def test_scores_are_what_loops_over_the_models_own_modules_give(name):
    subject, layout, pairs = subject_of(name), LAYOUTS[name], pairs_of(8)
    found = name_movers(subject, pairs, top=20)
    model, eager = subject.model, ZOO[name].build()
    eager.set_attn_implementation("eager")
    width, heads = subject.facts.head_dim, subject.facts.n_heads
    assert 0 < found.copying.mean() < 1
    for sample, ids in enumerate(pairs.clean_ids):
        ids, answer, wrong = list(ids), int(pairs.answer_ids[sample, 0]), int(pairs.wrong_ids[sample, 0])
        with torch.no_grad():
            patterns = eager(input_ids=torch.tensor([ids]), output_attentions=True).attentions
        assert abs(float(found.uniform[sample]) - ids.count(answer) / len(ids)) < 1e-6
        for layer, block in enumerate(layout.blocks(model)):
            if name == "gpt2":
                ((_, fused),) = captured(model, ids, [block.attn.c_attn])
                values, matrix = fused[:, 2 * 32 :].reshape(len(ids), heads, width), block.attn.c_proj.weight
            else:
                ((_, flat),) = captured(model, ids, [block.self_attn.v_proj])
                values = flat.reshape(len(ids), -1, width).repeat_interleave(2, dim=1)
                matrix = block.self_attn.o_proj.weight.T
            for head in range(heads):
                row = patterns[layer][0, head, -1]
                said = sum(float(row[k]) for k, token in enumerate(ids) if token == answer)
                foil = sum(float(row[k]) for k, token in enumerate(ids) if token == wrong)
                assert abs(said - float(found.attention[layer, head, sample])) < 1e-5
                assert abs(foil - float(found.attention_wrong[layer, head, sample])) < 1e-5
                with torch.no_grad():
                    written = values[ids.index(answer), head] @ matrix[head * width : (head + 1) * width]
                    logits = layout.head(model, layout.norm(model)(written))
                rank = logits.argsort(descending=True).tolist().index(answer)
                assert float(found.copying[layer, head, sample]) == float(rank < 20)
    assert torch.equal(found.values, found.attention * found.copying)


def test_an_encodable_set_is_encoded_and_bad_sets_are_refused():
    subject, pairs = subject_of("gpt2"), pairs_of(6)

    class Encodable:
        def encode(self, tokenizer):
            assert tokenizer is subject.tokenizer
            return pairs

    assert torch.equal(name_movers(subject, Encodable()).attention, name_movers(subject, pairs).attention)
    with pytest.raises(DataError, match="does not occur"):
        name_movers(
            subject,
            SimpleNamespace(**{**vars(pairs), "answer_ids": pairs.answer_ids * 0 + torch.arange(3, 9)[:, None]}),
        )
    with pytest.raises(DataError, match="same answer"):
        name_movers(subject, SimpleNamespace(**{**vars(pairs), "answer_ids": pairs.answer_ids * 0 + 11}))
