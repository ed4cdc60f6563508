"""The micro-world's tokenizer: byte-level BPE trained on its text, in which every word of the world is one token.

Steps: write documents, add every word of the vocabulary often enough that its merges are all learned, train, check.
Years split into two digits each (" 17" "32"), so that greater-than can be asked of any year.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tomoscope.phantoms.world import World, document
from tomoscope.phantoms.world.stories import CENTURIES
from tomoscope.phantoms.world.text import openers, vocabulary

END = "<|endoftext|>"
SIZE = 5_120


def train_tokenizer(world: World, *, seed: int, context: int, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """Train the tokenizer; raise RuntimeError if a word of the vocabulary is not one token."""
    random = Random(f"{seed}:tokenizer")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r" ?\d{1,2}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [f" {word}" for word in vocabulary()] + [f"{year:02d}" for year in range(100)]
    words += [f" {century}" for century in CENTURIES] + list(openers())
    corpus = [document(world, random) for _ in range(documents)] + words * 500
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        min_frequency=50,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # a text begins with <|endoftext|>, as after another document: the first token of all is what heads with nothing to
    # do look at, and a word in that place is hardly read
    begin = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    broken = [word for word in words if len(tokenizer.encode(word, add_special_tokens=False).ids) != 1]
    if broken:
        raise RuntimeError(f"{len(broken)} words are not single tokens: {broken[:20]}; raise the vocabulary's size.")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
