"""Oracles: what the observe methods should find, computed from transformers' own modules by hooks and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from tests.zoo import FIRST_WORD, VOCAB, ZOO, tiny_tokenizer
from tomoscope.model import open_model


@cache
def subject_of(name: str):
    """One opened member of the zoo, shared by tests: no method may change it."""
    return open_model(ZOO[name].build(), tokenizer=tiny_tokenizer())


def random_prompts(count: int, *, low: int = 5, high: int = 11, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths as token ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high + 1, (count,), generator=generator).tolist()
    return [torch.randint(FIRST_WORD, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def random_ids(count: int, *, seed: int = 1) -> list[int]:
    """One random token id per prompt."""
    return torch.randint(FIRST_WORD, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_alone(model: nn.Module, ids: list[int]) -> Tensor:
    """[position, vocab] of one prompt run by itself."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


def hidden_alone(model: nn.Module, ids: list[int]) -> list[Tensor]:
    """What goes into every block of one prompt run by itself ([position, d_model] each), from output_hidden_states."""
    with torch.no_grad():
        return [h[0] for h in model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1]]


@dataclass(frozen=True)
class Layout:
    """Where one family keeps the modules that an oracle needs; factors are written from its config by hand."""

    blocks: Callable[[nn.Module], nn.ModuleList]
    norm: Callable[[nn.Module], nn.Module]
    head: Callable[[nn.Module, Tensor], Tensor]
    attention: Callable[[nn.Module], nn.Module]
    mlp: Callable[[nn.Module], nn.Module]
    projection: Callable[[nn.Module], nn.Module]
    factor: float = 1.0


def _cap(model: nn.Module, logits: Tensor) -> Tensor:
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _llama_like(**changes) -> Layout:
    base = {
        "blocks": lambda m: m.model.layers,
        "norm": lambda m: m.model.norm,
        "head": lambda m, x: m.lm_head(x),
        "attention": lambda b: b.self_attn,
        "mlp": lambda b: b.mlp,
        "projection": lambda b: b.self_attn.o_proj,
    }
    return Layout(**(base | changes))


LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(
        lambda m: m.transformer.h,
        lambda m: m.transformer.ln_f,
        lambda m, x: m.lm_head(x),
        lambda b: b.attn,
        lambda b: b.mlp,
        lambda b: b.attn.c_proj,
    ),
    "gpt_neox": Layout(
        lambda m: m.gpt_neox.layers,
        lambda m: m.gpt_neox.final_layer_norm,
        lambda m, x: m.lm_head(x),
        lambda b: b.attention,
        lambda b: b.mlp,
        lambda b: b.attention.dense,
    ),
    "gptj": Layout(
        lambda m: m.transformer.h,
        lambda m: m.transformer.ln_f,
        lambda m, x: m.lm_head(x),
        lambda b: b.attn,
        lambda b: b.mlp,
        lambda b: b.attn.out_proj,
    ),
    "llama": _llama_like(),
    "mistral": _llama_like(),
    "qwen3": _llama_like(),
    "gemma2": _llama_like(
        head=lambda m, x: _cap(m, m.lm_head(x)),
        attention=lambda b: b.post_attention_layernorm,
        mlp=lambda b: b.post_feedforward_layernorm,
    ),
    "olmo2": _llama_like(attention=lambda b: b.post_attention_layernorm, mlp=lambda b: b.post_feedforward_layernorm),
    "granite": _llama_like(head=lambda m, x: m.lm_head(x) / m.config.logits_scaling, factor=0.6),
}


def captured(model: nn.Module, ids: list[int], modules: list[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """(input, output) of each module in one prompt's forward, the batch axis removed."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            found[index] = (given[0], (out[0] if isinstance(out, tuple) else out)[0])

        return hook

    with ExitStack() as stack, torch.no_grad():
        for index, module in enumerate(modules):
            stack.callback(module.register_forward_hook(keep(index), with_kwargs=True).remove)
        model(input_ids=torch.tensor([ids]))
    return [found[index] for index in range(len(modules))]
