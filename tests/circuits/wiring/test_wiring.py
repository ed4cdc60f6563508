"""Rewired runs against the library's own forward, the corrupted prompt's run, rewiring written out, and a reference."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.circuits.reference_eap import SCORES, TOKENS, reference_metric, reference_pairs, reference_subject
from tests.zoo import ZOO
from tomoscope.circuits import Graph
from tomoscope.circuits.metrics import KL, LogitDifference
from tomoscope.circuits.wiring.ablation import Ablation
from tomoscope.circuits.wiring.wiring import Wiring
from tomoscope.errors import AlignmentError, DataError
from tomoscope.model import Batch, Subject, build_subject, replace

DECODERS = [name for name, entry in ZOO.items() if entry.kind == "decoder" and name != "openai_gpt"]

# the library's own BLOOM and Gemma 2 give NaN for a left-padded row in float64, its product of experts is not to be had
# in float64, and the norms of Gemma and OLMo compute in float32
FLOAT32 = ("bloom", "gemma2", "gemma3", "olmo2", "qwen3_moe", "deepseek_v3", "gpt_oss")


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
            # OLMo 2 norms all heads' queries together, so there they are put together before that
            plain = f"layer.{layer}.attn.{which}"
            place = f"model.layers.{layer}.self_attn.{which}_proj" if subject.facts.family == "olmo2" else plain
            reads = [subject.run(clean, edits=[replace(pre, given(stream, i))], read=[place]) for i in mine]
            values = [r.activations[place] for r in reads]
            if values:
                heads = [v.unflatten(-1, (len(mine), -1)) if v.dim() == 3 else v for v in values]
                repeats = heads[0].shape[2] // len(mine)  # values that arrive repeated for each query head
                value = torch.stack([heads[h // repeats][:, :, h] for h in range(heads[0].shape[2])], dim=2)
                rest.append(replace(place, value.reshape(values[0].shape)))
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


# ---- a GPT-2 written out


def gpt2_written_out(model, ids: torch.Tensor, other: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[vocab] logits at the last token of one prompt, edge by edge, from the weights."""
    w, heads = dict(model.named_parameters()), model.config.n_head
    width, layers = model.config.n_embd, model.config.n_layer
    size, graph = width // heads, Graph.of(build_subject(model, name="gpt2"))
    names = {name: i for i, name in enumerate(graph.sources)}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + model.config.layer_norm_epsilon).sqrt()
        return scaled * w[name + ".weight"] + w[name + ".bias"]

    def forward(tokens: torch.Tensor, ablated: dict[str, torch.Tensor] | None) -> tuple[torch.Tensor, dict]:
        out = {"embed": w["transformer.wte.weight"][tokens]}
        stream = out["embed"] + w["transformer.wpe.weight"][: len(tokens)]

        def given(name: str) -> torch.Tensor:
            x = stream
            for source, value in out.items():
                if ablated is not None and graph.allowed[names[source], graph.destinations.index(name)]:
                    x = x + (1 - mask[names[source], graph.destinations.index(name)]) * (ablated[source] - value)
            return x

        for layer in range(layers):
            at = f"transformer.h.{layer}."
            W, b = w[at + "attn.c_attn.weight"], w[at + "attn.c_attn.bias"]
            W_O, written = w[at + "attn.c_proj.weight"], []
            for head in range(heads):
                q, k, v = (
                    norm(given(f"a{layer}.h{head}<{which}>"), at + "ln_1") @ W[:, place : place + size]
                    + b[place : place + size]
                    for which, place in zip("qkv", (head * size + i * width for i in range(3)), strict=True)
                )
                scores = (q @ k.T / size**0.5).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
                written.append(scores.softmax(-1) @ v @ W_O[head * size : (head + 1) * size])
            stream = stream + sum(written) + w[at + "attn.c_proj.bias"]
            out |= {f"a{layer}.h{head}": value for head, value in enumerate(written)}
            hidden = norm(given(f"m{layer}"), at + "ln_2") @ w[at + "mlp.c_fc.weight"] + w[at + "mlp.c_fc.bias"]
            hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
            out[f"m{layer}"] = hidden @ w[at + "mlp.c_proj.weight"] + w[at + "mlp.c_proj.bias"]
            stream = stream + out[f"m{layer}"]
        return norm(given("logits"), "transformer.ln_f")[-1] @ w["transformer.wte.weight"].T, out

    return forward(ids, forward(other, None)[1])[0]


@torch.no_grad()
def test_any_mask_equals_a_gpt2_written_out():
    model = ZOO["gpt2"].build().double()
    subject = build_subject(model, name="gpt2")
    ids, other = torch.randint(3, 96, (2, 2, 7), generator=torch.Generator().manual_seed(0))
    wiring = Wiring(subject, ids.tolist(), ablation=Ablation.paired(other.tolist()))
    masks = torch.rand(4, *wiring.graph.allowed.shape, generator=torch.Generator().manual_seed(1)).double()
    masks[:2] = masks[:2].round()
    expected = [[gpt2_written_out(model, i, o, mask) for i, o in zip(ids, other, strict=True)] for mask in masks]
    got = wiring.logits(masks)
    torch.testing.assert_close(got, torch.stack([torch.stack(e) for e in expected]), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("how", ["topn", "greedy"])
def test_circuits_measure_as_in_the_public_reference(how: str):
    pairs, metric = reference_pairs(), reference_metric()
    wiring = Wiring(reference_subject(), pairs.clean, ablation=Ablation.paired(pairs.corrupted))
    assert [s.replace("embed", "input") for s in wiring.graph.sources] == TOKENS["sources"]
    assert list(wiring.graph.destinations) == TOKENS["destinations"]
    sizes = (0, 5, 10, 20, 50, 100, 262)
    masks = torch.stack([torch.from_numpy(SCORES[f"circuit_{how}_{n}_mask"]) for n in sizes])
    expected = torch.stack([torch.from_numpy(SCORES[f"circuit_{how}_{n}_metric"]) for n in sizes])
    torch.testing.assert_close(wiring.run(masks, metric), expected, atol=1e-9, rtol=1e-9)


# ---- gradients, pieces, other ablations


@pytest.mark.parametrize(
    ("name", "step", "relative"),
    # where a norm or attention computes in float32, a small step drowns in its rounding
    [("gpt2", 1e-5, 1e-6), ("phi", 1e-5, 1e-6), ("gptj", 1e-2, 2e-3), ("llama", 1e-2, 2e-3), ("granite", 1e-2, 2e-3)],
)
def test_the_gradient_of_a_mask_is_that_of_finite_differences(name: str, step: float, relative: float):
    subject = subject_of(name)
    clean, corrupted = prompts_of(subject)
    wiring = Wiring(subject, clean, ablation=Ablation.paired(corrupted))
    mask = torch.rand(wiring.graph.allowed.shape, generator=torch.Generator().manual_seed(0)).double()
    mask.requires_grad_()
    logits = wiring.logits(mask)
    torch.testing.assert_close(logits.detach(), wiring.logits(mask.detach()), atol=1e-6, rtol=1e-6)
    logits[:, 7].sum().backward()
    assert mask.grad is not None
    direction = mask.grad.sign() + 0.1 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    ends = [wiring.logits((mask + by * direction).detach())[:, 7].sum() for by in (step, -step)]
    expected = float(ends[0] - ends[1]) / (2 * step)
    assert float((mask.grad * direction).sum()) == pytest.approx(expected, rel=relative)
    assert not mask.grad[~wiring.graph.allowed].any()
    assert all(p.grad is None for p in subject.model.parameters())


def test_pieces_that_fit_give_the_same(monkeypatch: pytest.MonkeyPatch):
    subject = subject_of("llama")
    clean, corrupted = prompts_of(subject)
    wiring = Wiring(subject, clean, ablation=Ablation.paired(corrupted))
    masks = torch.rand(7, *wiring.graph.allowed.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    metric = LogitDifference([[5], [6], [7]], [[15], [16], [17]])
    whole, logits = wiring.run(masks, metric), wiring.logits(masks)
    monkeypatch.setattr(Wiring, "_pieces", lambda *a: [(slice(0, 2), 3), (slice(2, 3), 3)])
    seen: list[tuple[int, int]] = []
    torch.testing.assert_close(
        wiring.run(masks, metric, progress=lambda *a: seen.append(a)), whole, **tolerance(subject)
    )
    torch.testing.assert_close(wiring.logits(masks), logits, **tolerance(subject))
    assert seen[-1] == (21, 21)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "granite", "phi", "deepseek_v3"])
def test_ablations_replace_a_source_by_what_they_say(name: str):
    subject = subject_of(name)
    clean, corrupted = prompts_of(subject)
    wirings = {
        kind: Wiring(subject, clean, ablation=ablation)
        for kind, ablation in {
            "zero": Ablation.zero(),
            "mean": Ablation.mean(corrupted),
            "mean_by_position": Ablation.mean_by_position(corrupted),
        }.items()
    }
    graph = wirings["zero"].graph
    mask = torch.ones(graph.allowed.shape)
    row = graph.sources.index("m1")
    mask[row] = 0
    # one source ablated towards all its readers is that source replaced
    site = "layer.1.mlp.out"
    values = subject.read(corrupted, site)[site].double()
    tokens = values[corrupted.mask]
    by_place = torch.zeros_like(values)
    for place in range(clean.width):
        there = [r for r in range(3) if place < corrupted.lengths[r]]
        mean = torch.stack([values[r, int(corrupted.pads[r]) + place] for r in there]).mean(0)
        for r in range(3):
            if int(clean.pads[r]) + place < clean.width:
                by_place[r, int(clean.pads[r]) + place] = mean
    expected = {
        "zero": torch.zeros_like(values),
        "mean": tokens.mean(0).expand_as(values),
        "mean_by_position": by_place,
    }
    for kind, value in expected.items():
        edited = subject.run(clean, edits=[replace(site, value)])
        wanted = edited.logits[torch.arange(3), clean.last]
        torch.testing.assert_close(wirings[kind].logits(mask), wanted, atol=1e-4, rtol=1e-4)


def test_a_resample_comes_from_another_prompt_of_its_length():
    subject = subject_of("gpt2")
    rows = torch.randint(3, 96, (4, 6), generator=torch.Generator().manual_seed(0)).tolist()
    wiring = Wiring(subject, rows, ablation=Ablation.resample(seed=3))
    kept = wiring.ablated.outs[1]
    own = wiring.clean.outs[1]
    for row in range(4):
        same = [other for other in range(4) if torch.allclose(kept[row], own[other])]
        assert len(same) == 1
        assert same[0] != row
    again = Wiring(subject, rows, ablation=Ablation.resample(seed=3))
    assert torch.equal(again.ablated.embed, wiring.ablated.embed)
    with pytest.raises(DataError, match="No other prompt"):
        Wiring(subject, [[5, 6, 7], [8, 9]], ablation=Ablation.resample())


def test_what_does_not_fit_is_refused():
    subject = subject_of("gpt2")
    wiring = Wiring(subject, [[5, 6, 7]], ablation=Ablation.zero())
    with pytest.raises(DataError, match="Masks here are"):
        wiring.logits(torch.ones(3, 3))
    with pytest.raises(AlignmentError, match="3 tokens against 2"):
        Wiring(subject, [[5, 6, 7]], ablation=Ablation.paired([[5, 6]]))
    with pytest.raises(AlignmentError, match="2 prompts"):
        Wiring(subject, [[5, 6, 7], [1, 2, 3]], ablation=Ablation.paired([[5, 6, 8]]))
    with pytest.raises(AlignmentError, match="means by position"):
        Wiring(subject, [[5, 6, 7]], ablation=Ablation.mean_by_position([[5, 6]]))
    with pytest.raises(DataError, match="unknown"):
        Ablation("median")


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
def test_half_precision_keeps_the_models_own_logits_and_comes_close_elsewhere(name: str):
    half, whole = subject_of(name, torch.bfloat16), subject_of(name, torch.float32)
    results = []
    for subject in (half, whole):
        clean, corrupted = prompts_of(subject)
        wiring = Wiring(subject, clean, ablation=Ablation.paired(corrupted))
        masks = torch.rand(2, *wiring.graph.allowed.shape, generator=torch.Generator().manual_seed(0)) > 0.3
        masks[0] = True
        results.append(wiring.logits(masks).float())
        torch.testing.assert_close(wiring.logits(masks[0]), wiring.clean_logits, atol=0.03, rtol=0.02)
    assert (results[0] - results[1]).abs().max() < 0.06 * results[1].abs().max()
