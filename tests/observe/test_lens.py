"""The logit lens against transformers' own hidden states, norm and head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.observe.raw import LAYOUTS, hidden_alone, logits_alone, random_ids, random_prompts, subject_of
from tests.zoo import DECODERS, VOCAB
from tomoscope.errors import DataError
from tomoscope.observe import logit_lens


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_lens_is_the_models_own_norm_and_head_on_its_own_hidden_states(name):
    subject, layout = subject_of(name), LAYOUTS[name]
    prompts, answers = random_prompts(5), random_ids(5)
    reading = logit_lens(subject, prompts, answers=answers)
    assert reading.sites[0] == "layer.0.resid_pre"
    for row, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        final = logits_alone(subject.model, ids)[-1].log_softmax(-1)
        for index, hidden in enumerate(hidden_alone(subject.model, ids)):
            with torch.no_grad():
                lens = layout.head(subject.model, layout.norm(subject.model)(hidden[-1])).log_softmax(-1)
            kl = F.kl_div(lens, final, reduction="sum", log_target=True)
            assert torch.allclose(reading.kl[index, row], kl, atol=2e-5)
            assert torch.allclose(
                reading.entropy[index, row], torch.distributions.Categorical(logits=lens).entropy(), atol=1e-5
            )
            assert torch.allclose(reading.answer_probability[index, row], lens[answer].exp(), atol=1e-6)
            order = lens.argsort(descending=True).tolist()
            assert reading.answer_rank[index, row] == order.index(answer)
            assert reading.top[index, row] == order[0]
            assert reading.agreement[index, row] == (order[0] == int(final.argmax()))


@pytest.mark.parametrize("name", DECODERS)
def test_the_last_row_is_the_model_itself(name):
    subject = subject_of(name)
    prompts = random_prompts(4, seed=3)
    reading = logit_lens(subject, prompts)
    assert len(reading.sites) == subject.facts.n_layers + 1
    assert reading.kl[-1].abs().max() < 1e-5
    assert reading.agreement[-1].all()
    assert torch.allclose(reading.entropy[-1], reading.final_entropy, atol=1e-4)
    assert reading.kl[0].min() > 1e-3


def test_padding_batches_and_chunks_change_nothing():
    subject = subject_of("gpt2")
    prompts = random_prompts(6)
    together = logit_lens(subject, prompts, at=None)
    tight = logit_lens(subject, prompts, at=None, chunk_bytes=4 * VOCAB * 3)
    alone = [logit_lens(subject, [prompt], at=None) for prompt in prompts]
    assert torch.allclose(together.kl, torch.cat([one.kl for one in alone], dim=1), atol=1e-5)
    assert torch.allclose(together.kl, tight.kl, atol=1e-6)
    assert torch.equal(together.top, tight.top)
    assert together.prompt.tolist() == [i for i, ids in enumerate(prompts) for _ in ids]
    assert together.position.tolist() == [p for ids in prompts for p in range(len(ids))]
    several = logit_lens(subject, prompts, at=[0, "last"])
    ends = [p for i, ids in enumerate(prompts) for p in (0, len(ids) - 1)]
    assert several.position.tolist() == ends
    picked = [
        int(((together.prompt == i) & (together.position == p)).nonzero())
        for i, p in zip(several.prompt, ends, strict=True)
    ]
    assert torch.allclose(several.kl, together.kl[:, picked], atol=1e-5)


def test_bad_arguments_are_refused():
    subject = subject_of("gpt2")
    with pytest.raises(DataError, match="no prompts"):
        logit_lens(subject, [])
    with pytest.raises(DataError, match="1 answers for 2 prompts"):
        logit_lens(subject, [[5], [6]], answers=[3])
    with pytest.raises(DataError, match="outside the vocabulary"):
        logit_lens(subject, [[5]], answers=[VOCAB])
