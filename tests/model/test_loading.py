"""Opening models that are wrong in some way: each mistake has its own clear error before anything long is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.zoo import ZOO, tiny_tokenizer
from tomoscope.errors import (
    CorruptModelError,
    ModelError,
    ModelNotFoundError,
    PromptError,
    ResourceError,
    TokenizerError,
    UnknownSiteError,
    UnsafeFormatError,
)
from tomoscope.model import build_subject, open_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = ZOO["llama"].build()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_opens_and_gives_the_librarys_logits(saved: Path) -> None:
    subject = open_model(saved)
    assert subject.source == str(saved)
    assert subject.tokenizer is not None
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        oracle = ZOO["llama"].build()(input_ids=ids).logits
    assert torch.equal(subject.run(ids).logits, oracle)
    assert open_model(saved, dtype="bfloat16").facts.dtype == "bfloat16"
    assert open_model(saved, attention="eager").model.config._attn_implementation == "eager"


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/directory", "a/b/c"])
def test_no_such_directory(source: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no directory"):
        open_model(source)


def test_no_such_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="neither a local directory nor"):
        open_model("nobody-here/no-such-model")


def test_a_file_is_no_model(saved: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is a file"):
        open_model(saved / "config.json")


def test_a_directory_without_config_or_weights(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        open_model(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="no weights"):
        open_model(saved)


def test_pickled_weights_are_refused_unless_allowed(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(state, saved / "pytorch_model.bin")
    with pytest.raises(UnsafeFormatError, match="unpickling can run any code"):
        open_model(saved)
    assert open_model(saved, allow_pickle=True).facts.n_layers == 3


def test_remote_code_is_refused(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "something_new", "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "modeling.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(UnsafeFormatError, match="code of its own"):
        open_model(saved)


@pytest.mark.parametrize("keep", [3, 200, 5000, -1])
def test_truncated_weights(saved: Path, keep: int) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CorruptModelError, match="truncated|no whole safetensors"):
        open_model(saved)


def test_a_missing_shard(saved: Path) -> None:
    shutil.rmtree(saved)
    ZOO["llama"].build().save_pretrained(saved, max_shard_size="20KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[0].unlink()
    with pytest.raises(CorruptModelError, match="lacks 1 of"):
        open_model(saved)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 64}, "disagree"),
        ({"intermediate_size": 40}, "disagree"),
        ({"num_hidden_layers": 2}, "smaller model"),
        ({"num_hidden_layers": 5}, "not in the files"),
        ({"vocab_size": 50}, "disagree"),
        ({"num_attention_heads": 0}, "could not be built"),
    ],
)
def test_a_config_that_lies(saved: Path, change: dict[str, int], match: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CorruptModelError, match=match):
        open_model(saved)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"text"'])
def test_a_config_that_is_no_config(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(CorruptModelError):
        open_model(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_located(saved: Path, value: float) -> None:
    state = load_file(saved / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(1 of"):
        open_model(saved)


def test_a_directory_without_tokenizer_opens_but_reads_no_text(saved: Path) -> None:
    for path in saved.glob("tokenizer*"):
        path.unlink()
    subject = open_model(saved)
    assert subject.tokenizer is None
    assert subject.read([[5, 6]], "embed")["embed"].shape == (1, 2, 32)
    with pytest.raises(TokenizerError, match="without a tokenizer"):
        subject.read("The cat", "embed")


def test_a_broken_tokenizer(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(CorruptModelError, match="tokenizer"):
        open_model(saved)


def test_wrong_device_and_dtype(saved: Path) -> None:
    with pytest.raises(ResourceError, match="not there"):
        open_model(saved, device="cuda:7")
    with pytest.raises(ModelError, match="unknown"):
        open_model(saved, dtype="float3")


def test_prompts_that_can_not_be_read(saved: Path) -> None:
    subject = open_model(saved)
    for prompts, match in [
        ("", "empty"),
        ([], "no prompt"),
        ([[]], "empty"),
        ([[5] * 65], "context"),
        ([[5, 900]], "vocabulary"),
    ]:
        with pytest.raises(PromptError, match=match):
            subject.read(prompts, "embed")
    with pytest.raises(PromptError, match="outside"):
        subject.read([[5, 6]], "embed", at=2)
    with pytest.raises(PromptError, match="no span"):
        subject.read([[5, 6]], "embed", at="subject")
    with pytest.raises(PromptError, match="exceed the context"):
        subject.generate([[5] * 60], max_new_tokens=10)


def test_a_batch_of_one_and_of_many_agree(saved: Path) -> None:
    subject = open_model(saved)
    many = subject.last_logits([[5, 6, 7]] * 33)
    torch.testing.assert_close(many[:1], subject.last_logits([[5, 6, 7]]), rtol=1e-5, atol=1e-5)


def test_unknown_sites_suggest_the_nearest(saved: Path) -> None:
    subject = open_model(saved)
    with pytest.raises(UnknownSiteError, match="layer.1.resid_post"):
        subject.read([[5, 6]], "layer.1.resid_pots")
    with pytest.raises(UnknownSiteError, match="layers 0 to 2|layer 0 to 2"):
        subject.read([[5, 6]], "layer.9.resid_post")
    with pytest.raises(UnknownSiteError, match="has no head axis"):
        subject.read([[5, 6]], "layer.1.resid_post[head=1]")
    with pytest.raises(UnknownSiteError, match="head 4"):
        subject.read([[5, 6]], "layer.1.attn.z[head=4]")


def test_names_of_other_tools_are_understood(saved: Path) -> None:
    subject = open_model(saved)
    acts = subject.read(
        [[5, 6]], "blocks.1.hook_resid_post", "blocks.0.attn.hook_z", "model.layers.2.output", "model.layers.0.mlp"
    )
    assert list(acts) == ["layer.1.resid_post", "layer.0.attn.z", "layer.2.resid_post", "model.layers.0.mlp"]


def test_a_compiled_model_is_opened_by_what_it_wraps() -> None:
    model = ZOO["gpt2"].build()
    subject = build_subject(torch.compile(model))
    assert subject.model is model


def test_a_module_whose_forward_fails_says_so() -> None:
    with pytest.raises(ModelError, match="probe forward failed"):
        build_subject(ZOO["bare_module"].build(), example=torch.zeros(2, 3))


def test_a_module_without_example_gives_its_modules_by_path() -> None:
    subject = build_subject(ZOO["bare_module"].build())
    assert subject.facts.n_layers == 0
    acts = subject.read(torch.zeros(2, 8, 32), "blocks.1.channels")
    assert acts["blocks.1.channels"].shape == (2, 8, 32)
