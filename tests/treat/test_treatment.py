"""A treatment is undone to the bit, saved and read back equal, and merged into plain weights."""

from __future__ import annotations

import pytest
import torch
import transformers

from tests.tiny import tokenizer
from tests.zoo import ZOO
from tomoscope.errors import DataError, EditError, LedgerError
from tomoscope.model import build_subject
from tomoscope.treat import Dense, LowRank, Sparse, difference, load_treatment, merge_to, treatment_of

FAMILIES = {"gpt2": "transformer.h.1.mlp.c_proj.weight", "llama": "model.layers.1.mlp.down_proj.weight"}
IDS = torch.tensor([[5, 9, 17, 33]])


@pytest.fixture(params=FAMILIES)
def subject(request):
    return build_subject(ZOO[request.param].build(), name=request.param)


def low_rank(subject, *, seed=0, scale=0.1):
    name = FAMILIES[subject.name]
    rows, columns = subject.model.get_parameter(name).shape
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, 2, generator=draw), torch.randn(2, columns, generator=draw)
    return treatment_of(subject, {name: LowRank(left * scale, right)}, method="test", requests=[{"a": 1}], seed=3)


def bits(subject):
    return {name: value.clone() for name, value in subject.model.state_dict().items()}


def same(subject, before):
    now = subject.model.state_dict()
    return all(torch.equal(now[name], value) for name, value in before.items())


def test_undone_to_the_bit_also_after_an_exception(subject):
    before, logits = bits(subject), subject.last_logits(IDS)
    treatment, name = low_rank(subject), FAMILIES[subject.name]
    handle = treatment.apply(subject)
    expected = before[name] + treatment.changes[name].left @ treatment.changes[name].right
    torch.testing.assert_close(subject.model.state_dict()[name], expected)
    assert not torch.allclose(subject.last_logits(IDS), logits)
    handle.undo()
    handle.undo()
    assert same(subject, before)
    with pytest.raises(EditError), treatment.applied(subject):  # noqa: PT012
        assert not same(subject, before)
        treatment.apply(subject)
    assert same(subject, before)
    assert torch.equal(subject.last_logits(IDS), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_undone_in_other_precisions(dtype):
    subject = build_subject(ZOO["llama"].build().to(dtype), name="llama")
    before = bits(subject)
    with low_rank(subject, scale=10.0).applied(subject):
        assert not same(subject, before)
    assert same(subject, before)


def test_one_entry_of_several_fails(subject):
    """The second parameter does not exist: nothing is changed."""
    before, name = bits(subject), FAMILIES[subject.name]
    change = low_rank(subject).changes[name]
    with pytest.raises(EditError, match="no parameter"):
        treatment_of(subject, {name: change, name + "s": change}, method="test")
    with pytest.raises(EditError, match="has shape"):
        treatment_of(subject, {name: Dense(torch.ones(3))}, method="test")
    with pytest.raises(EditError, match="NaN"):
        treatment_of(subject, {name: Dense(torch.full_like(before[name], torch.nan))}, method="test")
    assert same(subject, before)


def test_treatments_that_stand_are_undone_in_order(subject):
    before = bits(subject)
    first = low_rank(subject, seed=1).apply(subject)
    second = low_rank(subject, seed=2).apply(subject)
    with pytest.raises(EditError, match="reverse order"):
        first.undo()
    second.undo()
    first.undo()
    assert same(subject, before)
    # others' parameters do not matter
    other = next(n for n, p in subject.model.named_parameters() if n != FAMILIES[subject.name] and p.dim() == 2)
    shape = subject.model.get_parameter(other).shape
    first = low_rank(subject, seed=1).apply(subject)
    second = treatment_of(subject, {other: Dense(torch.ones(shape))}, method="test").apply(subject)
    first.undo()
    second.undo()
    assert same(subject, before)


def test_made_for_other_weights(subject):
    treatment = low_rank(subject)
    with treatment.applied(subject), pytest.raises(EditError, match="not the weights"):
        treatment.apply(subject)
    with treatment.applied(subject), treatment.applied(subject, anyway=True):
        pass


def test_saved_and_read_back_equal(subject, tmp_path):
    name = FAMILIES[subject.name]
    after = subject.model.get_parameter(name).detach().clone()
    after[0, 3] += 1.0
    made = [low_rank(subject), difference(subject, {name: after}, method="one entry")]
    made.append(difference(subject, {name: after * 1.5}, method="all"))
    for treatment, kind in zip(made, (LowRank, Sparse, Dense), strict=True):
        again = load_treatment(treatment.save(tmp_path / "some.safetensors"))
        assert isinstance(again.changes[name], kind)
        assert again.origin == treatment.origin
        for part, tensor in treatment.changes[name].tensors().items():
            assert torch.equal(again.changes[name].tensors()[part], tensor)
        with treatment.applied(subject):
            logits = subject.last_logits(IDS)
        with again.applied(subject):
            assert torch.equal(subject.last_logits(IDS), logits)
    assert made[0].origin.requests == ({"a": 1},)
    assert made[0].origin.seed == 3
    assert len(made[1].changes[name].values) == 1


def test_a_difference_gives_the_same_bits(subject):
    name = FAMILIES[subject.name]
    before = subject.model.get_parameter(name).detach().clone()
    after = before * torch.logspace(-3, 3, before.numel()).reshape(before.shape)
    with difference(subject, {name: after}, method="x").applied(subject):
        assert torch.equal(subject.model.get_parameter(name), after)
    assert torch.equal(subject.model.get_parameter(name), before)
    assert not difference(subject, {name: before}, method="x").changes


@pytest.mark.parametrize("damage", ["cut", "no metadata", "absent", "text"])
def test_a_damaged_file_is_no_treatment(damage, tmp_path):
    subject = build_subject(ZOO["gpt2"].build(), name="gpt2")
    path = tmp_path / "some.safetensors"
    if damage == "cut":
        low_rank(subject).save(path)
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "no metadata":
        from safetensors.torch import save_file

        save_file({"a::delta": torch.ones(2)}, path)
    elif damage == "text":
        path.write_text("{}")
    with pytest.raises(DataError, match="no treatment"):
        load_treatment(path)
    with pytest.raises(LedgerError):
        low_rank(subject).save(tmp_path / "no" / "such.safetensors")


def test_merged_into_a_plain_directory(subject, tmp_path):
    subject.tokenizer = tokenizer()
    before, treatment = bits(subject), low_rank(subject)
    with treatment.applied(subject):
        logits = subject.run(IDS).logits
        second = low_rank(subject, seed=5)
    place = merge_to([treatment], subject, tmp_path / "out")
    assert same(subject, before)
    plain = transformers.AutoModelForCausalLM.from_pretrained(place)
    assert torch.equal(plain(input_ids=IDS).logits, logits)
    assert transformers.AutoTokenizer.from_pretrained(place) is not None
    card = (place / "README.md").read_text()
    for part in ("test", treatment.origin.model_hash, FAMILIES[subject.name], '{"a": 1}'):
        assert part in card
    assert load_treatment(place / "treatment_0.safetensors").origin == treatment.origin
    merge_to([treatment, second], subject, tmp_path / "both")
    assert same(subject, before)
    with pytest.raises(EditError, match="there already"):
        merge_to(treatment, subject, place)
    with pytest.raises(EditError, match="not the weights"):
        merge_to(second, subject, tmp_path / "third")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["both", "out"]


def test_tied_embeddings(tmp_path):
    """GPT-2's unembedding is its embedding: a change moves both, unless the treatment unties them, which is undone."""
    subject = build_subject(ZOO["gpt2"].build(), name="gpt2")
    model, before, logits = subject.model, bits(subject), subject.last_logits(IDS)
    assert model.lm_head.weight is model.transformer.wte.weight
    delta = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    tied = treatment_of(subject, {"transformer.wte.weight": Dense(delta)}, method="both")
    with tied.applied(subject):
        assert model.lm_head.weight is model.transformer.wte.weight
    apart = treatment_of(subject, {"transformer.wte.weight": Dense(delta)}, method="one", untie=True)
    with apart.applied(subject):
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
        treated = subject.run(IDS).logits
        assert not torch.allclose(treated[:, -1], logits)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings
    assert same(subject, before)
    plain = transformers.AutoModelForCausalLM.from_pretrained(merge_to(apart, subject, tmp_path / "out"))
    assert torch.equal(plain(input_ids=IDS).logits, treated)
    assert model.lm_head.weight is model.transformer.wte.weight
