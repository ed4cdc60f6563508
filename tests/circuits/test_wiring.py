"""Rewired runs against the library's own forward, the corrupted prompt's run, rewiring written out, and a reference."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.zoo import ZOO
from tomoscope.circuits import Graph
from tomoscope.circuits.ablation import Ablation
from tomoscope.circuits.metrics import KL, LogitDifference
from tomoscope.circuits.wiring import Wiring
from tomoscope.model import Batch, Subject, build_subject, replace

DECODERS = [name for name, entry in ZOO.items() if entry.kind == "decoder" and name != "openai_gpt"]

# the library's own BLOOM and Gemma 2 give NaN for a left-padded row in float64; its product of experts takes none
FLOAT32 = ("bloom", "gemma2", "qwen3_moe", "deepseek_v3", "gpt_oss")


@cache
def subject_of(name: str, dtype: torch.dtype = torch.float64) -> Subject:
    dtype = torch.float32 if name in FLOAT32 and dtype == torch.float64 else dtype
    return build_subject(ZOO[name].build().to(dtype), name=name)


def tolerance(subject: Subject) -> dict[str, float]:
    return {"atol": 1e-11, "rtol": 1e-9} if subject.dtype == torch.float64 else {"atol": 3e-5, "rtol": 3e-5}


def prompts_of(subject: Subject, *, padding: str = "left") -> tuple[Batch, Batch]:
    ids = torch.randint(3, 96, (3, 6), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 2:4] = torch.randint(3, 96, (3, 2), generator=torch.Generator().manual_seed(1))
    if padding == "left":
        rows = ids.tolist(), other.tolist()
        return tuple(subject.tokens([r[0][1:], *r[1:]]) for r in rows)  # type: ignore[return-value]
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return tuple(subject.tokens({"input_ids": i, "attention_mask": mask}) for i in (ids, other))  # type: ignore


def last(subject: Subject, batch: Batch) -> torch.Tensor:
    logits = subject.run(batch).logits
    return logits[torch.arange(len(batch)), batch.last]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_all_kept_is_the_model_and_all_ablated_the_corrupted_run(name: str, padding: str):
    subject = subject_of(name)
    clean, corrupted = prompts_of(subject, padding=padding)
    wiring = Wiring(subject, clean, ablation=Ablation.paired(corrupted))
    shape = wiring.graph.allowed.shape
    logits = wiring.logits(torch.stack([torch.ones(shape), torch.zeros(shape)]))
    torch.testing.assert_close(logits[0], last(subject, clean), **tolerance(subject))
    torch.testing.assert_close(logits[1], last(subject, corrupted), **tolerance(subject))
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# ---- rewiring by plain runs with edits: one run a destination, nothing shared with the wiring


def contributions(subject: Subject, layer: int, acts) -> torch.Tensor:
    """[pair, position, head, d_model] of what heads add, from the library's own values."""
    result, out = acts[f"layer.{layer}.attn.result"], acts[f"layer.{layer}.attn.out"]
    block = subject.structure.blocks[layer]
    if block.taps["attn.out"].path != block.projection and "norm" in block.taps["attn.out"].path:
        return result * (out / result.sum(2)).nan_to_num()[:, :, None]  # an RMS norm at the end: no bias, no mean
    return result * block.taps["attn.out"].factor


def run_by_hand(subject: Subject, clean: Batch, corrupted: Batch, mask: torch.Tensor) -> torch.Tensor:
    graph = Graph.of(subject)
    parts = ("attn.out", "mlp.out") + (("attn.result",) if any(w.kind == "head" for w in graph.writers) else ())
    sites = ["layer.0.resid_pre", *(f"layer.{i}.{p}" for i in range(graph.n_layers) for p in parts)]
    ends = ["embed"] if subject.structure.embed_adds else []
    base, other = (subject.read(b, *sites, *ends) for b in (clean, corrupted))

    def sources(layer: int, acts) -> dict[str, torch.Tensor]:
        out = {f"m{layer}": acts[f"layer.{layer}.mlp.out"], f"a{layer}": acts[f"layer.{layer}.attn.out"]}
        if f"layer.{layer}.attn.result" in list(acts):
            heads = contributions(subject, layer, acts)
            out |= {f"a{layer}.h{h}": heads[:, :, h] for h in range(heads.shape[2])}
        return out

    start = "embed" if ends else "layer.0.resid_pre"
    ablated, current = {"embed": other[start]}, {"embed": base[start]}
    for layer in range(graph.n_layers):
        ablated |= sources(layer, other)

    def given(stream: torch.Tensor, column: int) -> torch.Tensor:
        total = stream.clone()
        for row, name in enumerate(graph.sources):
            if graph.allowed[row, column]:
                total = total + (1 - float(mask[row, column])) * (ablated[name] - current[name])
        return total

    stream = base["layer.0.resid_pre"]
    for layer in range(graph.n_layers):
        pre, mid = f"layer.{layer}.resid_pre", f"layer.{layer}.resid_mid"
        columns = [(i, r) for i, r in enumerate(graph.readers) if r.layer == layer]
        rest = [replace(pre, stream)]
        for which in ("q", "k", "v"):
            mine = [i for i, r in columns if r.input == which]
            reads = [
                subject.run(clean, edits=[replace(pre, given(stream, i))], read=[f"layer.{layer}.attn.{which}"])
                for i in mine
            ]
            values = [r.activations[f"layer.{layer}.attn.{which}"] for r in reads]
            if values:
                value = values[0].clone()
                repeats = value.shape[2] // len(mine)  # values that arrive repeated for each query head
                for head in range(value.shape[2]):
                    value[:, :, head] = values[head // repeats][:, :, head]
                rest.append(replace(f"layer.{layer}.attn.{which}", value))
        one = next((i for i, r in columns if r.kind == "attention"), None)
        if one is not None:
            rest = [replace(pre, given(stream, one))]
        mine = [name for name in sites if name.startswith(f"layer.{layer}.attn")]
        acts = subject.run(clean, edits=rest, read=mine).activations
        attn = acts[f"layer.{layer}.attn.out"]
        found = {name: acts[name] for name in acts} | {f"layer.{layer}.mlp.out": attn}
        current |= {n: v for n, v in sources(layer, found).items() if not n.startswith("m")}
        column = next(i for i, r in columns if r.kind == "mlp")
        site, before = (pre, stream) if subject.structure.blocks[layer].parallel else (mid, stream + attn)
        mlp = subject.run(clean, edits=[replace(site, given(before, column))], read=[f"layer.{layer}.mlp.out"])
        current[f"m{layer}"] = mlp.activations[f"layer.{layer}.mlp.out"]
        stream = stream + attn + current[f"m{layer}"]
    end = given(stream, len(graph.readers) - 1)
    logits = subject.run(clean, edits=[replace(f"layer.{graph.n_layers - 1}.resid_post", end)]).logits
    return logits[torch.arange(len(clean)), clean.last]


@pytest.mark.parametrize("name", DECODERS)
def test_any_mask_equals_rewiring_by_plain_runs(name: str):
    subject = subject_of(name)
    clean, corrupted = prompts_of(subject)
    graph = Graph.of(subject)
    generator = torch.Generator().manual_seed(3)
    few = torch.rand(graph.allowed.shape, generator=generator) > 0.3
    late = torch.ones_like(few)
    late[:, [r.layer < 2 for r in graph.readers]] = True
    late[2, -3:] = False
    soft = torch.rand(graph.allowed.shape, generator=generator).double()
    masks = torch.stack([few.double(), late.double(), soft])
    wiring = Wiring(subject, clean, graph, ablation=Ablation.paired(corrupted))
    expected = torch.stack([run_by_hand(subject, clean, corrupted, mask) for mask in masks])
    torch.testing.assert_close(wiring.logits(masks), expected, **tolerance(subject))
    metric = LogitDifference([[5], [6], [7]], [[15], [16], [17]])
    values = torch.stack([e[range(3), [5, 6, 7]] - e[range(3), [15, 16, 17]] for e in expected])
    torch.testing.assert_close(wiring.run(masks, metric), values, **tolerance(subject))


def test_a_metric_of_all_tokens_and_one_mask_at_a_time_give_the_same():
    subject = subject_of("gpt2")
    clean, corrupted = prompts_of(subject)
    wiring = Wiring(subject, clean, ablation=Ablation.paired(corrupted))
    masks = torch.rand(5, *wiring.graph.allowed.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    metric = KL(wiring.clean_logits)
    together = wiring.run(masks, metric)
    alone = torch.cat([wiring.run(mask[None], metric) for mask in masks])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-9)
    assert (together > 0).all()
