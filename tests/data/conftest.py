from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tomoscope.data.tasks import agreement, colours, facts, gendered_pronoun, greater_than, ioi, words


def _texts() -> list[str]:
    """Sentences holding every word of the tasks after a space, often enough for the merges to be learned."""
    pairs = [word for pair in (*words.NOUNS, *words.VERBS, *words.RELATIVE_VERBS, *words.CAPITALS) for word in pair]
    lists = [words.FEMALE, words.MALE, words.PLACES, words.GIFTS, words.EVENTS, words.COLOURS, words.THINGS]
    lists += [words.ARGUMENTS, words.DESCRIPTION, words.SURNAMES, words.PROFESSIONS, pairs, ["he", "she"]]
    known = [word for some in lists for word in some]
    years = [f" {century}{year:02d}" for century in range(11, 20) for year in range(100)]
    templates = [*ioi.TEMPLATES, *gendered_pronoun.TEMPLATES, *greater_than.TEMPLATES]
    templates += [text for some in (*agreement.TEMPLATES.values(), facts.CAPITAL.templates) for text in some]
    templates += [text for pair in colours.TEMPLATES for text in pair]
    return [f"So the {word}" for word in known] * 40 + years * 40 + templates * 4


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


@pytest.fixture(scope="session")
def byte_bpe() -> PreTrainedTokenizerFast:
    """GPT-2-like: byte-level BPE, the space inside the token, years in two parts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d{1,2}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3_000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return _wrap(tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture(scope="session")
def metaspace_bpe() -> PreTrainedTokenizerFast:
    """Llama-like: a mark for the space, put before the text too, digits apart, bytes for what is unknown, <s> first."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=3_000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def word_level() -> PreTrainedTokenizerFast:
    """BERT-like: lower case, whole words, [CLS] and [SEP] around, [UNK] for the rest."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordLevelTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _wrap(tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(params=["byte_bpe", "metaspace_bpe", "word_level"])
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def material() -> Path:
    folder = Path(os.environ.get("TOMOSCOPE_MATERIAL", Path(__file__).resolve().parents[2] / "../shared/material"))
    if not folder.is_dir():
        pytest.skip(f"the material is not at {folder} (set TOMOSCOPE_MATERIAL)")
    return folder.resolve()


@pytest.fixture(scope="session")
def stories_tokenizer(material: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(material / "models" / "stories3M")
