"""Subjects for the exams' tests: a whole-word tokenizer that knows the tasks' words, random models, a trained one."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.zoo import ZOO, randomise
from tomoscope.data import TASKS
from tomoscope.data.tasks import agreement, colours, facts, gendered_pronoun, greater_than, ioi, words
from tomoscope.model import Subject, open_model

FACTS = (
    "{subject} was born in",
    "{subject} was born in the city of",
    "The birthplace of {subject} is",
    "{subject} comes from",
    "The home town of {subject} is",
    "{subject} lives in",
    "{subject} now lives in the city of",
    "{subject} has a house in",
    "Today {subject} lives in",
    "The house of {subject} is in",
    "{subject} works as a",
    "{subject} is a",
    "The job of {subject} is that of a",
    "{subject} has worked for years as a",
    "For many years {subject} was a",
)
"""Further wordings of facts, whose words the tokenizer knows."""


@cache
def whole_words() -> transformers.PreTrainedTokenizerFast:
    """Every word of the tasks is one token, with or without its space; a year is a century and two digits."""
    pairs = [word for pair in (*words.NOUNS, *words.VERBS, *words.RELATIVE_VERBS, *words.CAPITALS) for word in pair]
    lists = [words.FEMALE, words.MALE, words.PLACES, words.GIFTS, words.EVENTS, words.COLOURS, words.THINGS]
    lists += [words.ARGUMENTS, words.DESCRIPTION, pairs, ["he", "she"]]
    texts = [f"So the {word}" for some in lists for word in some] + [f"in {i:02d}" for i in range(100)]
    texts += [f"{i:02d}" for i in range(100)] + ["Words:\n:param self def"]
    texts += [*ioi.TEMPLATES, *gendered_pronoun.TEMPLATES, *greater_than.TEMPLATES]
    texts += [text for some in (*agreement.TEMPLATES.values(), facts.CAPITAL.templates, FACTS) for text in some]
    texts += [text for pair in colours.TEMPLATES for text in pair]
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+| ?\d\d|\s|[^\sA-Za-z\d]"), "isolated")
    inner.decoder = decoders.Fuse()
    special = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.WordLevelTrainer(vocab_size=4000, special_tokens=special, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", bos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def random_subject(family: str, seed: int) -> Subject:
    """An untrained model of a family that can read the tasks."""
    tokenizer = whole_words()
    return open_model(randomise(ZOO[family].build(vocab=len(tokenizer)), seed), tokenizer=tokenizer)


TRAINED_ON = ("gendered_pronoun", "facts")


@cache
def trained_subject() -> Subject:
    """A GPT-2 that was taught capitals and pronouns, and nothing else (a few seconds on one core).

    Its first block writes nothing by attention, so what the answer rests on can't leave its position before block 1.
    """
    tokenizer = whole_words()
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=len(tokenizer), resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.transformer.h[0].attn.c_proj.parameters():
        parameter.requires_grad_(False).zero_()
    texts = []
    for name, n in (("gendered_pronoun", 700), ("facts", 120)):
        made = TASKS[name].make(tokenizer, n, seed=99)
        texts += [pair.clean.text + pair.answers[0] for pair in made] * (1 if n > 500 else 5)
    rows = tokenizer(texts, padding=True, return_tensors="pt")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(250):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20) * (1 - step / 250)
        take = torch.randint(len(texts), (64,), generator=generator)
        ids, mask = rows["input_ids"][take], rows["attention_mask"][take]
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        # only the answer is taught: what stands before it is chance
        torch.nn.functional.cross_entropy(logits[:, -2], ids[:, -1]).backward()
        optimiser.step()
        optimiser.zero_grad()
    return open_model(model.eval(), tokenizer=tokenizer)
