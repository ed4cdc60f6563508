"""Every family of the zoo, against the library's own forward: logits, reads, edits, gradients, padding, generation."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from tests.zoo import DECODERS, ZOO
from tomoscope.errors import UnavailableSiteError
from tomoscope.model import Subject, add, build_subject, replace, zero
from tomoscope.model.bypass import bypassing
from tomoscope.model.probe import unwrap
from tomoscope.model.sites import Site

STACKS = [name for name in ZOO if ZOO[name].kind not in ("cnn", "module")]
TOKENS = [name for name in ZOO if ZOO[name].kind in ("decoder", "encoder")]

NO_SDPA = ("gemma2", "gpt_oss")  # soft-caps and sinks: the library itself refuses
BOTH = [(name, "eager") for name in ZOO] + [(name, "sdpa") for name in ZOO if name not in NO_SDPA]


@cache
def opened(name: str, attention: str = "") -> Subject:
    entry = ZOO[name]
    model = entry.build()
    if attention in ("sdpa", "eager"):
        set_attention(model, attention)
    return build_subject(model, name=name, example=entry.inputs() if entry.kind == "module" else None)


def set_attention(model: nn.Module, attention: str) -> None:
    """Also for the families outside the dispatch, which take the implementation from the config alone."""
    if type(model).__name__.startswith("Falcon"):
        model.config._attn_implementation = attention
    else:
        model.set_attn_implementation(attention)


def available(subject: Subject) -> list[str]:
    return [name for name, info in subject.sites().items() if info.available]


def plain(subject: Subject, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return unwrap(subject.model(**inputs))[0]


def padded(length: int = 9) -> dict[str, torch.Tensor]:
    """Three rows, of which two are padded on the left, with the positions that the mask says."""
    ids = torch.randint(3, 96, (3, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", ZOO)
def test_opening_says_what_the_model_is(name: str) -> None:
    subject, entry = opened(name), ZOO[name]
    assert subject.facts.parity == 0.0
    assert subject.facts.kind == {"cnn": "vision"}.get(entry.kind, entry.kind)
    if entry.kind not in ("cnn", "module"):
        assert subject.facts.n_layers == 3
        assert subject.facts.d_model == 32
        assert subject.facts.n_heads == 4
        assert subject.facts.identity_error < 1e-6
    for info in subject.sites().values():
        assert info.available or info.reason


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_reading_every_site_leaves_the_logits_bit_identical(name: str, attention: str) -> None:
    subject = opened(name, "" if ZOO[name].kind in ("cnn", "module") else attention)
    inputs = ZOO[name].inputs(seed=3)
    run = subject.run(inputs, read=available(subject))
    assert torch.equal(run.logits, plain(subject, inputs))
    for site, value in run.activations.items():
        # masked scores may be minus infinity
        assert not (value.isnan() | (value == float("inf"))).any(), site
        assert site.endswith("scores") or torch.isfinite(value).all(), site
        assert value.dim() == len(run.activations.axes[site]), site


@pytest.mark.parametrize(("name", "attention"), [pair for pair in BOTH if pair[0] in DECODERS])
def test_left_padding_is_bit_identical_to_the_library_with_positions(name: str, attention: str) -> None:
    subject = opened(name, attention)
    inputs = padded()
    oracle = dict(inputs)
    if "position_ids" in subject.accepts:
        oracle["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    run = subject.run(inputs, read=available(subject))
    keep = inputs["attention_mask"].bool()
    assert torch.equal(run.logits[keep], plain(subject, oracle)[keep])


@pytest.mark.parametrize("name", TOKENS)
def test_a_padded_prompt_agrees_with_the_same_prompt_alone(name: str) -> None:
    subject = opened(name)
    prompts = [[5, 9, 17], [8, 30, 31, 32, 7, 40, 12], [3, 4, 5, 6, 7]]
    together = subject.read(prompts, "layer.*.resid_post", at="last")
    for row, prompt in enumerate(prompts):
        alone = subject.read([prompt], "layer.*.resid_post", at="last")
        for site in together:
            torch.testing.assert_close(together[site][row], alone[site][0], rtol=2e-5, atol=2e-5)
    batch = subject.tokens(prompts)
    torch.testing.assert_close(
        subject.last_logits(prompts)[0], subject.last_logits([prompts[0]])[0], rtol=2e-5, atol=2e-5
    )
    assert batch.lengths == [3, 7, 5]


@pytest.mark.parametrize("name", STACKS)
def test_the_stream_is_the_sum_of_its_writes(name: str) -> None:
    subject = opened(name)
    acts = subject.read(
        ZOO[name].inputs(seed=1), "layer.*.resid_pre", "layer.*.resid_post", "layer.*.attn.out", "layer.*.mlp.out"
    )
    for layer in range(3):
        total = acts[f"layer.{layer}.resid_pre"] + acts[f"layer.{layer}.attn.out"] + acts[f"layer.{layer}.mlp.out"]
        if not subject.facts.renormalised:
            torch.testing.assert_close(total, acts[f"layer.{layer}.resid_post"], rtol=1e-5, atol=1e-5)
    if not subject.facts.renormalised and not subject.facts.parallel:
        mid = subject.read(ZOO[name].inputs(seed=1), "layer.1.resid_mid")["layer.1.resid_mid"]
        torch.testing.assert_close(mid, acts["layer.1.resid_pre"] + acts["layer.1.attn.out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_an_edit_that_adds_zero_changes_nothing(name: str) -> None:
    subject = opened(name)
    inputs = ZOO[name].inputs(seed=2)
    base = plain(subject, inputs)
    for site in available(subject):
        logits = subject.run(inputs, edits=[add(site, torch.zeros(1))]).logits
        # scores and patterns are written by pattern @ value in place of the fused kernel, which rounds differently
        tolerance = 2e-5 if site.endswith(("scores", "pattern")) else 0.0
        torch.testing.assert_close(logits, base, rtol=tolerance, atol=tolerance, msg=site)


@pytest.mark.parametrize("name", ZOO)
def test_every_site_can_be_written(name: str) -> None:
    subject = opened(name)
    inputs = ZOO[name].inputs(seed=2)
    base = plain(subject, inputs)
    for site in available(subject):
        value = subject.read(inputs, site)[site]
        shift = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        run = subject.run(inputs, edits=[add(site, shift)], read=[site])
        torch.testing.assert_close(run.activations[site], value + shift, rtol=1e-4, atol=1e-4, msg=site)
        assert not torch.allclose(run.logits, base, atol=1e-5), f"writing {site} had no effect"


@pytest.mark.parametrize("name", STACKS)
def test_zeroing_a_head_equals_zeroing_its_rows_of_the_projection(name: str) -> None:
    subject = opened(name)
    inputs = ZOO[name].inputs(seed=4)
    block = subject.structure.blocks[1]
    projection = subject.model.get_submodule(block.projection)
    for site in ("layer.1.attn.z[head=2]", "layer.1.attn.result[head=2]"):
        edited = subject.run(inputs, edits=[zero(site)]).logits
        weight = projection.weight
        before = weight.detach().clone()
        width = subject.facts.head_dim
        rows = slice(2 * width, 3 * width)
        with torch.no_grad():
            (weight if type(projection).__name__ == "Conv1D" else weight.T)[rows] = 0
        try:
            oracle = plain(subject, inputs)
        finally:
            with torch.no_grad():
                weight.copy_(before)
        torch.testing.assert_close(edited, oracle, rtol=1e-5, atol=1e-5, msg=site)


@pytest.mark.parametrize("name", [n for n in STACKS if ZOO[n].kind != "vision"])
def test_adding_to_the_stream_equals_running_the_rest_from_it(name: str) -> None:
    subject = opened(name)
    inputs = ZOO[name].inputs(seed=6)
    stream = subject.read(inputs, "layer.1.resid_post")["layer.1.resid_post"]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(2))
    edited = subject.run(inputs, edits=[add("layer.1.resid_post", vector, 0.7)]).logits
    with bypassing(subject, {0: None, 1: stream + 0.7 * vector}):
        oracle = plain(subject, inputs)
    assert torch.equal(edited, oracle)
    assert "forward" not in subject.model.get_submodule(subject.structure.blocks[0].path).__dict__


def hook_gradient(subject: Subject, inputs: dict[str, torch.Tensor], site: str) -> torch.Tensor | None:
    """The oracle: autograd through the unhooked model, with a plain hook that keeps the tensor at a module's border."""
    from tomoscope.model.taps import find_tap

    tap = find_tap(subject.structure, subject.grammar.parse(site)[0])
    if tap.side not in ("in", "out"):
        return None
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict, output: object = None) -> None:
        value = unwrap(output)[0] if tap.side == "out" else (args[0] if args else kwargs["hidden_states"])
        value.retain_grad()
        kept.append(value)

    module = subject.model.get_submodule(tap.path)
    handle = (
        module.register_forward_hook(keep, with_kwargs=True)
        if tap.side == "out"
        else module.register_forward_pre_hook(lambda m, a, k: keep(m, a, k), with_kwargs=True)
    )
    try:
        logits = unwrap(subject.model(**inputs))[0]
        logits.float().square().sum().backward()
    finally:
        handle.remove()
        subject.model.zero_grad()
    return kept[0].grad / tap.factor


@pytest.mark.parametrize("name", STACKS)
def test_gradients_equal_autograds_own(name: str) -> None:
    subject = opened(name)
    inputs = ZOO[name].inputs(seed=7)
    sites = [site for site in available(subject) if site != "logits"]
    out = subject.gradients(inputs, lambda logits, batch: logits.float().square().flatten(1).sum(1), sites)
    assert all(p.requires_grad for p in subject.model.parameters())
    checked = 0
    for site in sites:
        if site == "pos_embed" or "mlp_output" in site:
            continue
        if name.startswith("falcon") and subject.facts.parallel and site.endswith("mlp.out"):
            continue  # falcon adds attention in place to this tensor, so a plain hook can't keep it
        oracle = hook_gradient(subject, inputs, site)
        if oracle is None:
            continue
        got = out.gradients[site]
        torch.testing.assert_close(
            got.reshape(oracle.shape), oracle, rtol=1e-3, atol=1e-4 * float(oracle.abs().max()), msg=site
        )
        checked += 1
    assert checked >= 12


@pytest.mark.parametrize("name", STACKS)
def test_gradients_inside_attention_predict_small_edits(name: str) -> None:
    """q, k, v, scores, pattern, z, result, resid_mid: the directional derivative against a central difference in
    float64."""
    entry = ZOO[name]
    model = entry.build().double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    subject = build_subject(model, name=name)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in entry.inputs(seed=8).items()}

    def metric(logits: torch.Tensor, batch: object) -> torch.Tensor:
        return logits.square().flatten(1).sum(1)

    sites = [s for s in available(subject) if s.startswith("layer.1.") and ("attn." in s or "mid" in s or "pre" in s)]
    out = subject.gradients(inputs, metric, sites)
    for site in sites:
        grad = out.gradients[site]
        direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        if site.endswith(("scores", "pattern")):
            pattern = subject.read(inputs, "layer.1.attn.pattern")["layer.1.attn.pattern"]
            direction = direction * (pattern > 0)
        # ReLU has kinks; elsewhere norms and softmax compute in float32 even here, so a smaller step drowns in rounding
        step = 1e-5 if name == "opt" else 2e-3
        plus = metric(subject.run(inputs, edits=[add(site, direction, step)]).logits, None).sum()
        minus = metric(subject.run(inputs, edits=[add(site, direction, -step)]).logits, None).sum()
        numeric, predicted = float(plus - minus) / (2 * step), float((grad * direction).sum())
        assert predicted == pytest.approx(numeric, rel=1e-2, abs=2e-3 * float(grad.abs().max() + 1e-6)), site


@pytest.mark.parametrize("name", DECODERS)
def test_cached_generation_under_edits_equals_uncached(name: str) -> None:
    subject = opened(name)
    prompts = [[5, 9, 17, 33], [8, 30, 31, 32, 7, 40, 12]]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(4))
    edits = [
        add("layer.1.resid_post", vector, 0.5),
        zero("layer.0.attn.z[head=1]"),
        replace("layer.2.mlp.out", vector, at="last"),
        add("layer.1.attn.k[head=0]", torch.ones(1), 0.3),
        add("layer.0.attn.out", vector, 0.2, during="decode"),
    ]
    edits += [add("layer.2.resid_pre", vector, 0.4, during="prefill")]
    cached = subject.generate(prompts, max_new_tokens=6, edits=edits)
    assert cached == subject.generate(prompts, max_new_tokens=6, edits=edits, cached=False)
    alone = [subject.generate([prompt], max_new_tokens=6, edits=edits)[0] for prompt in prompts]
    assert cached == alone


@pytest.mark.parametrize("name", STACKS)
def test_bf16(name: str) -> None:
    entry = ZOO[name]
    model = entry.build().bfloat16()
    subject = build_subject(model, name=name)
    assert subject.facts.dtype == "bfloat16"
    assert subject.facts.parity == 0.0
    assert [i.available for i in subject.sites().values()] == [i.available for i in opened(name).sites().values()]
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in entry.inputs(seed=3).items()}
    run = subject.run(inputs, read=available(subject))
    assert torch.equal(run.logits, plain(subject, inputs))


@pytest.mark.parametrize("name", DECODERS)
def test_unembedding_the_last_stream_gives_the_logits(name: str) -> None:
    subject = opened(name)
    inputs = ZOO[name].inputs(seed=9)
    stream = subject.read(inputs, "layer.2.resid_post")["layer.2.resid_post"]
    torch.testing.assert_close(subject.unembed(stream), plain(subject, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STACKS)
def test_patterns_are_what_eager_attention_returns(name: str) -> None:
    """Against the library's own attention weights, where the family returns them."""
    entry = ZOO[name]
    inputs = entry.inputs(seed=10)
    # falcon's own sdpa and eager patterns differ under ALiBi, so each is compared with itself
    subject = opened(name, "eager") if name.startswith("falcon") else opened(name)
    oracle = entry.build()
    set_attention(oracle, "eager")
    with torch.no_grad():
        weights = oracle(**inputs, output_attentions=True).attentions
    for layer, weight in enumerate(weights):
        got = subject.read(inputs, f"layer.{layer}.attn.pattern", f"layer.{layer}.attn.scores")
        torch.testing.assert_close(got[f"layer.{layer}.attn.pattern"], weight, rtol=1e-5, atol=1e-6)
        if subject.facts.family != "gpt_oss":
            scores = got[f"layer.{layer}.attn.scores"].softmax(-1)
            torch.testing.assert_close(scores, weight, rtol=1e-5, atol=1e-6)


def test_a_missing_site_says_why() -> None:
    subject = opened("phi")
    with pytest.raises(UnavailableSiteError, match="parallel"):
        subject.read([[5, 6]], "layer.1.resid_mid")
    assert Site("resid_mid", 1).name == "layer.1.resid_mid"


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_gradients_at_a_site_that_was_written_whole(name: str) -> None:
    subject = opened(name)
    inputs = ZOO[name].inputs(seed=13)
    value = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    for site in ("embed", "layer.1.resid_post", "layer.1.mlp.out"):
        out = subject.gradients(inputs, lambda logits, batch: logits[:, -1, 5], [site], edits=[replace(site, value)])
        torch.testing.assert_close(out.values[site], value)
        step = 1e-2 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        ends = [subject.run(inputs, edits=[replace(site, value + sign * step)]).logits[:, -1, 5] for sign in (1, -1)]
        predicted = (out.gradients[site] * step).flatten(1).sum(1)
        torch.testing.assert_close((ends[0] - ends[1]) / 2, predicted, rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("name", NO_SDPA)
def test_the_library_refuses_sdpa_for_soft_caps_and_sinks(name: str) -> None:
    with pytest.raises(ValueError, match="does not support"):
        opened(name, "sdpa")
