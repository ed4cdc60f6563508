"""Positions as a person says them, every edit against its formula, stacks against single runs, records of edits."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.model.test_families import opened, plain
from tests.zoo import ZOO, tiny_tokenizer
from tomoscope.data import Prompt
from tomoscope.errors import EditError, PromptError, UnavailableSiteError
from tomoscope.model import Encoded, Subject, add, build_subject, noise, project_out, replace, scale, scatter, zero

SITE = "layer.1.resid_post"
PROMPTS = [[5, 9, 17, 33], [8, 30, 31, 32, 7, 40, 12]]


@pytest.fixture(scope="module")
def spoken() -> Subject:
    return build_subject(ZOO["llama"].build(), tokenizer=tiny_tokenizer(), name="llama")


def test_positions_by_span_index_and_last(spoken: Subject) -> None:
    prompts = [Prompt.parse("The {subject:Space Needle} is in"), Prompt.parse("A cat and the {subject:dog} is in")]
    every = spoken.read(prompts, SITE)
    batch = every.batch
    for at, column in [
        ("last", lambda row: batch.last[row]),
        (-2, lambda row: batch.last[row] - 1),
        (0, lambda row: batch.pads[row]),
        ("subject", lambda row: batch.pads[row] + batch.prompts[row].spans["subject"][1] - 1),
        ("subject.first", lambda row: batch.pads[row] + batch.prompts[row].spans["subject"][0]),
    ]:
        got = spoken.read(prompts, SITE, at=at)
        assert got.axes[SITE] == ("batch", "d_model")
        for row in range(2):
            assert torch.equal(got[SITE][row], every[SITE][row, int(column(row))]), at
    several = spoken.read(prompts, SITE, at=["subject", "last"])
    assert several[SITE].shape == (2, 2, 32)
    assert several.axes[SITE] == ("batch", "position", "d_model")
    span = prompts[0].encode(spoken.tokenizer).spans["subject"]
    assert batch.prompts[0].spans["subject"] == span
    assert spoken.read(prompts[:1], SITE, at="subject.all")[SITE].shape == (1, span[1] - span[0], 32)
    with pytest.raises(PromptError, match="different numbers"):
        spoken.read(prompts, SITE, at="subject.all")
    with pytest.raises(PromptError, match="unknown"):
        spoken.read(prompts, SITE, at="subject.middle")


def test_heads_and_axes(spoken: Subject) -> None:
    whole = spoken.read(PROMPTS, "layer.1.attn.z", "layer.1.attn.pattern", "layer.*.attn.v")
    assert whole.axes["layer.1.attn.z"] == ("batch", "position", "head", "head_dim")
    assert whole.axes["layer.1.attn.pattern"] == ("batch", "head", "query", "key")
    assert whole["layer.0.attn.v"].shape[2] == 2
    one = spoken.read(PROMPTS, "layer.1.attn.z[head=2]", "layer.1.attn.pattern[head=1]", at="last")
    assert one.axes["layer.1.attn.z[head=2]"] == ("batch", "head_dim")
    assert one.axes["layer.1.attn.pattern[head=1]"] == ("batch", "key")
    assert torch.equal(one["layer.1.attn.z[head=2]"], whole["layer.1.attn.z"][:, -1, 2])
    assert torch.equal(one["layer.1.attn.pattern[head=1]"], whole["layer.1.attn.pattern"][:, 1, -1])
    two = spoken.read(PROMPTS, "layer.1.attn.z[head=0,3]", "layer.1.attn.z[head=1]")
    assert torch.equal(two["layer.1.attn.z[head=0,3]"], whole["layer.1.attn.z"][:, :, [0, 3]])
    assert whole.stack("layer.*.attn.v").shape[0] == 3


def reread(subject: Subject, edits: list, site: str = SITE, **options: object) -> torch.Tensor:
    return subject.run(PROMPTS, edits=edits, read=[site], **options).activations[site]


def test_every_operation_is_its_formula() -> None:
    subject = opened("gpt2")
    base = subject.read(PROMPTS, SITE)[SITE]
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    vector = directions[0]
    torch.testing.assert_close(reread(subject, [add(SITE, vector, 2.0)]), base + 2 * vector)
    torch.testing.assert_close(reread(subject, [scale(SITE, 0.5)]), base * 0.5)
    assert float(reread(subject, [zero(SITE)]).abs().max()) == 0.0
    torch.testing.assert_close(reread(subject, [replace(SITE, vector)]), vector.expand_as(base))
    projected = reread(subject, [project_out(SITE, directions)])
    assert float((projected @ directions.T).abs().max()) < 1e-4
    basis, _ = torch.linalg.qr(directions.T)
    torch.testing.assert_close(projected, base - base @ basis @ basis.T, rtol=1e-4, atol=1e-5)
    twice = project_out(SITE, torch.stack([vector, 2 * vector]))  # dependent directions are one direction
    torch.testing.assert_close(
        reread(subject, [twice]), reread(subject, [project_out(SITE, vector)]), rtol=1e-4, atol=1e-5
    )
    noisy = reread(subject, [noise(SITE, 0.1, seed=3)]) - base
    assert torch.equal(noisy, reread(subject, [noise(SITE, 0.1, seed=3)]) - base)
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.2)
    both = reread(subject, [add(SITE, vector), scale(SITE, 3.0)])
    torch.testing.assert_close(both, (base + vector) * 3)


def test_positions_rows_and_heads_of_edits() -> None:
    subject = opened("gpt2")
    base = subject.read(PROMPTS, SITE)[SITE]
    vector = torch.ones(32)
    got = reread(subject, [add(SITE, vector, at="last", rows=[1])])
    changed = (got - base).abs().sum(-1) > 1e-6
    assert changed.nonzero().tolist() == [[1, 6]]
    got = reread(subject, [add(SITE, vector, at=[0, -1])])
    assert ((got - base).abs().sum(-1) > 1e-6).nonzero().tolist() == [[0, 3], [0, 6], [1, 0], [1, 6]]
    z = "layer.1.attn.z"
    base = subject.read(PROMPTS, z)[z]
    got = reread(subject, [zero(f"{z}[head=1,2]", at="last")], z)
    assert ((got - base).abs().sum(-1) > 0).nonzero().tolist() == [[0, 6, 1], [0, 6, 2], [1, 6, 1], [1, 6, 2]]
    pattern = "layer.1.attn.pattern"
    base = subject.read(PROMPTS, pattern)[pattern]
    got = reread(subject, [replace(f"{pattern}[head=0]", torch.zeros(7), at="last")], pattern)
    assert float(got[:, 0, -1].abs().max()) == 0.0
    assert torch.equal(got[:, 1:], base[:, 1:])
    read = subject.read(PROMPTS[::-1], z, at="last")[z]
    other = subject.run(PROMPTS, edits=[replace(z, read, at="last")], read=[z], at="last")
    assert torch.equal(other.activations[z], read)


def test_scatter_is_many_replacements() -> None:
    subject = opened("gpt2")
    index = torch.tensor([[0, 5, 1], [1, 2, 3]])
    values = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    z = "layer.1.attn.z"
    got = reread(subject, [scatter(z, index, values)], z)
    assert torch.equal(got[0, 5, 1], values[0])
    assert torch.equal(got[1, 2, 3], values[1])
    with pytest.raises(EditError, match="index"):
        scatter(z, index[:, :2], values)


def test_a_stack_of_edits_is_the_single_runs() -> None:
    subject = opened("llama")
    stack = [
        [],
        [zero("layer.0.attn.z[head=1]")],
        [add(SITE, torch.ones(32), at="last"), scale("layer.2.mlp.out", 0.3)],
    ]
    together = subject.run_stack(PROMPTS, stack)
    whole = subject.run_stack(PROMPTS, stack, last=False)
    for place, edits in enumerate(stack):
        torch.testing.assert_close(together[place], subject.last_logits(PROMPTS, edits=edits), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(whole[place, :, -1], together[place], rtol=1e-5, atol=1e-5)


def test_edits_compare_print_and_describe() -> None:
    first, second = add(SITE, torch.ones(32), 2.0, at="last"), add(SITE, torch.ones(32), 2.0, at="last")
    assert first == second
    assert hash(first) == hash(second)
    assert first != add(SITE, torch.zeros(32), 2.0, at="last")
    assert str(first) == "add 2 layer.1.resid_post at last"
    record = first.describe()
    assert record["value"]["shape"] == [32]
    assert len(record["value"]["sha256"]) == 16


def test_wrong_edits_say_what_is_wrong() -> None:
    subject = opened("gpt2")
    with pytest.raises(EditError, match="shape"):
        subject.run(PROMPTS, edits=[add(SITE, torch.ones(31))])
    with pytest.raises(EditError, match="NaN"):
        add(SITE, torch.full((32,), torch.nan))
    with pytest.raises(EditError, match="unknown"):
        add(SITE, torch.ones(32), during="later")
    with pytest.raises(PromptError, match="row"):
        subject.run(PROMPTS, edits=[zero(SITE, rows=[2])])
    with pytest.raises(UnavailableSiteError, match="No site"):
        subject.read(PROMPTS)


def test_images_and_any_module_are_read_and_edited_by_paths() -> None:
    subject = opened("resnet")
    inputs = ZOO["resnet"].inputs(seed=1)
    path = "resnet.encoder.stages.1.layers.0"
    value = subject.read(inputs, path)[path]
    assert value.dim() == 4
    half = value.clone()
    half[:, 3] = 0
    edited = subject.run(inputs, edits=[replace(path, half)]).logits
    kept: list[torch.Tensor] = []
    handle = subject.model.get_submodule(path).register_forward_hook(lambda m, a, out: kept.append(out) or half)
    try:
        oracle = plain(subject, inputs)
    finally:
        handle.remove()
    assert torch.equal(kept[0], value)
    assert torch.equal(edited, oracle)
    images = inputs["pixel_values"]
    assert torch.equal(subject.run(images).logits, plain(subject, inputs))


def test_token_ids_spans_and_encoded_prompts_are_prompts_too() -> None:
    subject = opened("gpt2")
    encoded = Encoded((5, 6, 7, 8), {"name": (1, 3)})
    value = subject.read([encoded], SITE, at="name")[SITE]
    assert torch.equal(value, subject.read([[5, 6, 7, 8]], SITE, at=2)[SITE])
    assert torch.equal(value, subject.read(torch.tensor([5, 6, 7, 8]), SITE, at=2)[SITE])


@pytest.mark.parametrize("write", [1e-3, 1.0])
def test_the_middle_stream_is_not_mistaken_for_the_block_s_input(write: float):
    """Beside one huge dimension a write changes the stream by less than rounding of the largest number suggests."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        model.transformer.wte.weight[:, 3] = 4e4
        for block in model.transformer.h:
            block.attn.c_proj.weight.mul_(write)
    subject = build_subject(model)
    sites = ("layer.*.resid_pre", "layer.*.attn.out", "layer.*.resid_mid")
    read = subject.read([[5, 6, 7], [8, 9, 10]], *sites)
    for layer in range(2):
        pre, out, mid = (read[site.replace("*", str(layer))] for site in sites)
        assert torch.equal(torch.as_tensor(pre + out), torch.as_tensor(mid))
        assert subject.structure.blocks[layer].taps["resid_mid"].path == f"transformer.h.{layer}.ln_2"
