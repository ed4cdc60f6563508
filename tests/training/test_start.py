from __future__ import annotations

import torch

from training import embedded


def test_two_heads_begin_by_looking_one_token_back() -> None:
    model = embedded.build(embedded.Recipe(), 200).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = model(input_ids=torch.randint(1, 200, (4, 48)), output_attentions=True).attentions
    back = patterns[0].diagonal(-1, 2, 3).mean((0, 2))
    assert (back[:2] > 0.4).all()
    assert (back[2:] < 0.2).all()


def test_keys_begin_as_queries_and_the_seed_decides_the_rest() -> None:
    one, same = (embedded.build(embedded.Recipe(), 200) for _ in range(2))
    other = embedded.build(embedded.Recipe(seed=1), 200)
    attention = one.model.layers[2].self_attn
    assert torch.equal(attention.q_proj.weight, attention.k_proj.weight)
    assert torch.allclose(attention.o_proj.weight, 0.25 * attention.v_proj.weight.T)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
