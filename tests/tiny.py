"""Tiny random decoders saved to disk with a tokenizer that has the tasks' words as single tokens.

For what must run on any opened model in no time: the documentation's code and the examples. Nothing is downloaded.
"""

from __future__ import annotations

import zlib
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tests.zoo import randomise
from tomoscope.data.tasks import words

VOCAB, CONTEXT, LAYERS = 3_000, 128, 3
END = "<|endoftext|>"
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT},
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            **{"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"intermediate_size": 48, "max_position_embeddings": CONTEXT},
        },
    ),
}


def known_words() -> list[str]:
    """Every word in the tasks' lists."""

    def flat(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        return [word for item in value for word in flat(item)] if isinstance(value, (tuple, list)) else []

    return [word for name, value in vars(words).items() if name.isupper() for word in flat(value)]


@cache
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE in which each of those words, after a space, is one token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([f" {word}" for word in [*known_words(), "he", "she"]] * 20, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, bos_token=END, eos_token=END, pad_token=END
    )


def save(folder: Path, *, family: str = "gpt2") -> Path:
    """Write a model directory, and return it."""
    config, model, values = FAMILIES[family]
    made = tokenizer()
    special = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    built = getattr(transformers, model)(getattr(transformers, config)(**values, vocab_size=len(made), **special))
    randomise(built, zlib.crc32(family.encode())).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
