"""The zoo: every family that tomoscope promises to open, as a tiny random model built from its config.

Nothing is downloaded. A model has 3 blocks, 32 dimensions, 4 heads (2 key-value heads where the family shares them), a
vocabulary of 96, float32, eval mode. After construction every weight is drawn again from a seed of the entry's name:
norms 1 + 0.1 N (or 0.1 N where the module adds the 1 itself), biases 0.05 N, matrices N / sqrt(fan in), so that nothing
is at the value where a mistake would not show (a zero bias, a norm of exactly one, a flat softmax).

    for entry in ZOO.values(): model = entry.build(); out = model(**entry.inputs(seed=0, batch=2, length=7))
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
import transformers
from torch import nn

VOCAB, D_MODEL, LAYERS, HEADS, KV_HEADS, CONTEXT = 96, 32, 3, 4, 2, 64
PAD, EOS, MASK = 0, 1, 2
FIRST_WORD = 3  # ids below are special and never drawn as inputs

Inputs = Callable[..., dict[str, torch.Tensor]]


@dataclass(frozen=True)
class ZooEntry:
    """One member of the zoo. `build(vocab=96)` makes the model; `inputs(seed, batch, length)` its keyword arguments."""

    name: str
    build: Callable[..., nn.Module]
    kind: str
    inputs: Inputs


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter and statistic again (see the module's docstring); in place, seeded, and set to eval."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: torch.Tensor, scale: float = 1.0, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + mean)

    with torch.no_grad():
        for module in model.modules():
            kind = type(module).__name__
            for name, parameter in module.named_parameters(recurse=False):
                if "norm" in kind.lower() and name != "bias":
                    normal(parameter, 0.1, 0.0 if parameter.abs().max() == 0 else 1.0)
                elif "bias" in name:
                    normal(parameter, 0.05)
                elif isinstance(module, nn.Embedding):
                    normal(parameter, 0.5)
                elif parameter.dim() < 2 or "token" in name or "position" in name:
                    normal(parameter, 0.2, 0.5 if "scale" in name or "gamma" in name else 0.0)
                elif isinstance(module, nn.Conv2d):
                    normal(parameter, parameter[0].numel() ** -0.5)
                else:
                    normal(parameter, parameter.shape[0 if kind == "Conv1D" else -1] ** -0.5)
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "e_score_correction_bias"):
                    normal(buffer, 0.1)
                elif name == "running_var":
                    buffer.copy_(1.0 + 0.2 * torch.rand(buffer.shape, generator=generator))
    return model.float().eval()


def token_inputs(seed: int = 0, batch: int = 2, length: int = 8, *, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    """Random words without padding: input_ids and attention_mask [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, vocab, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_inputs(seed: int = 0, batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    """Random images: pixel_values [batch, 3, 32, 32]; an image has no length."""
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def vector_inputs(seed: int = 0, batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    """Random vectors for the bare module: values [batch, 8, 32] (the mixer's number of positions is fixed)."""
    return {"values": torch.randn(batch, 8, D_MODEL, generator=torch.Generator().manual_seed(seed))}


class MixerBlock(nn.Module):
    """x + mix over positions, then x + mix over channels, each after a LayerNorm."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.norm_positions, self.norm_channels = nn.LayerNorm(width), nn.LayerNorm(width)
        self.positions = nn.Sequential(nn.Linear(positions, 16), nn.GELU(), nn.Linear(16, positions))
        self.channels = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = values + self.positions(self.norm_positions(values).transpose(1, 2)).transpose(1, 2)
        return values + self.channels(self.norm_channels(values))


class Mixer(nn.Module):
    """A small MLP-mixer without a config: [batch, 8, 32] -> 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(D_MODEL, D_MODEL)
        self.blocks = nn.ModuleList(MixerBlock(8, D_MODEL) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, 10)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        values = self.entry(values)
        for block in self.blocks:
            values = block(values)
        return self.head(self.norm(values).mean(dim=1))


_IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
_HF = {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, **_IDS}
_LLAMA = {**_HF, "num_key_value_heads": KV_HEADS, "intermediate_size": 48, "max_position_embeddings": CONTEXT}
_NEOX = {**_HF, "intermediate_size": 64, "max_position_embeddings": CONTEXT}
_GPT2 = {"n_embd": D_MODEL, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, **_IDS}
_GEMMA = {**_LLAMA, "head_dim": 12, "query_pre_attn_scalar": 10, "sliding_window": 4}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VIT = {**_HF, "intermediate_size": 64, "image_size": 32, "patch_size": 8, "num_labels": 10}
_STAGES = {"hidden_sizes": [8, 16], "depths": [2, 1], "num_labels": 10}
_MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 6, "v_head_dim": 10}
_FALCON = {**_HF, "max_position_embeddings": CONTEXT}

# name: (kind, config class, model class, config)
_TABLE: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "gpt2": ("decoder", "GPT2Config", "GPT2LMHeadModel", _GPT2),
    "gpt_neox": ("decoder", "GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX),
    "gpt_neox_sequential": (
        "decoder",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_NEOX, "use_parallel_residual": False},
    ),
    "gptj": ("decoder", "GPTJConfig", "GPTJForCausalLM", {**_GPT2, "rotary_dim": 4}),
    "gpt_neo": (
        "decoder",
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            **{"hidden_size": D_MODEL, "num_layers": LAYERS, "num_heads": HEADS, "window_size": 4, **_IDS},
            **{"max_position_embeddings": CONTEXT, "attention_types": [[["global", "local", "global"], 1]]},
        },
    ),
    "opt": (
        "decoder",
        "OPTConfig",
        "OPTForCausalLM",
        {**_HF, "ffn_dim": 64, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": D_MODEL},
    ),
    "bloom": (
        "decoder",
        "BloomConfig",
        "BloomForCausalLM",
        {"hidden_size": D_MODEL, "n_layer": LAYERS, "n_head": HEADS, **_IDS},
    ),
    "llama": ("decoder", "LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "mistral": ("decoder", "MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": 4}),
    "qwen2": ("decoder", "Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("decoder", "Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 12}),
    "qwen3_moe": (
        "decoder",
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_LLAMA, **_MOE, "head_dim": 12, "num_experts": 4, "mlp_only_layers": [1]},
    ),
    "gemma2": ("decoder", "Gemma2Config", "Gemma2ForCausalLM", {**_GEMMA, "layer_types": _ALTERNATING}),
    "gemma3": ("decoder", "Gemma3TextConfig", "Gemma3ForCausalLM", {**_GEMMA, "layer_types": _ALTERNATING}),
    "phi": ("decoder", "PhiConfig", "PhiForCausalLM", {**_NEOX, "num_key_value_heads": HEADS}),
    "olmo2": ("decoder", "Olmo2Config", "Olmo2ForCausalLM", _LLAMA),
    "falcon": (
        "decoder",
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
    ),
    "falcon_multi_query": ("decoder", "FalconConfig", "FalconForCausalLM", {**_FALCON, "multi_query": True}),
    "falcon_alibi": (
        "decoder",
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "granite": (
        "decoder",
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            **_LLAMA,
            **{"embedding_multiplier": 3.0, "logits_scaling": 0.5},
            **{"residual_multiplier": 0.6, "attention_multiplier": 0.3},
        },
    ),
    "deepseek_v3": (
        "decoder",
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **{**_LLAMA, **_MOE, **_MLA, "num_key_value_heads": HEADS, "n_routed_experts": 4},
            **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        },
    ),
    "gpt_oss": (
        "decoder",
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **{**_LLAMA, "head_dim": 12, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
            **{"layer_types": _ALTERNATING, "rope_parameters": _ROPE},
        },
    ),
    "openai_gpt": ("decoder", "OpenAIGPTConfig", "OpenAIGPTLMHeadModel", _GPT2),
    "bert": (
        "encoder",
        "BertConfig",
        "BertForMaskedLM",
        {**_HF, "intermediate_size": 64, "max_position_embeddings": CONTEXT},
    ),
    "distilbert": (
        "encoder",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {
            "dim": D_MODEL,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": 64,
            "max_position_embeddings": CONTEXT,
            **_IDS,
        },
    ),
    "roberta": (
        "encoder",
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**_HF, "intermediate_size": 64, "max_position_embeddings": CONTEXT, "type_vocab_size": 1},
    ),
    "vit": ("vision", "ViTConfig", "ViTForImageClassification", _VIT),
    "resnet": ("cnn", "ResNetConfig", "ResNetForImageClassification", {**_STAGES, "embedding_size": 8}),
    "convnext": ("cnn", "ConvNextConfig", "ConvNextForImageClassification", {**_STAGES, "num_stages": 2}),
}


def _builder(name: str, kind: str, config: str, model: str, arguments: dict[str, Any]) -> Callable[..., nn.Module]:
    def build(*, vocab: int = VOCAB) -> nn.Module:
        size = {"vocab_size": vocab} if kind in ("decoder", "encoder") else {}
        made = getattr(transformers, model)(getattr(transformers, config)(**{**arguments, **size}))
        return randomise(made, zlib.crc32(name.encode()))

    return build


_INPUTS: dict[str, Inputs] = {
    "decoder": token_inputs,
    "encoder": token_inputs,
    "vision": image_inputs,
    "cnn": image_inputs,
    "module": vector_inputs,
}
ZOO: dict[str, ZooEntry] = {
    name: ZooEntry(name, _builder(name, kind, config, model, arguments), kind, _INPUTS[kind])
    for name, (kind, config, model, arguments) in _TABLE.items()
}
ZOO["bare_module"] = ZooEntry("bare_module", lambda *, vocab=VOCAB: randomise(Mixer(), 7), "module", vector_inputs)

DECODERS = tuple(name for name, entry in ZOO.items() if entry.kind == "decoder")
ENCODERS = tuple(name for name, entry in ZOO.items() if entry.kind == "encoder")

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "When Mary and John went to the store, John gave a drink to Mary.",
    "The Space Needle is in Seattle, and the tower is in Paris.",
    "one two three four five six seven eight nine ten",
    "A cat sat on the mat; then the cat and the dog went to the park.",
)


def tiny_tokenizer(
    vocab: int = VOCAB, *, sentences: tuple[str, ...] = SENTENCES
) -> transformers.PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly `vocab` ids on a few sentences; <pad> 0, <eos> 1, <mask> 2, padding left.

    Only characters of the sentences have a token; others are dropped. Ids that the sentences can't fill: "<extra i>".
    """
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<pad>", "<eos>", "<mask>"], show_progress=False
    )
    inner.train_from_iterator(sentences, trainer)
    inner.add_tokens([f"<extra {i}>" for i in range(vocab - inner.get_vocab_size())])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **{"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<eos>", "mask_token": "<mask>"},
        padding_side="left",
        model_max_length=CONTEXT,
    )
