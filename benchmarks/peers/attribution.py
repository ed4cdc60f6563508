"""circuit-tracer on the model, transcoders and prompt that `attribution_graph` wrote, once for every line it reads.

Run by the interpreter of an environment that has circuit-tracer and the TransformerLens it needs; imports nothing of
ours. Prints one line of JSON a graph: seconds, seconds of pruning, features, and each feature row's absolute sum.
"""

import json
import sys
import time
from pathlib import Path


def main(folder: Path, batch: int) -> None:
    import torch
    from circuit_tracer.attribution.attribute_transformerlens import attribute
    from circuit_tracer.graph import prune_graph
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder / "model").eval()
    own = model.config
    config = HookedTransformerConfig(
        n_layers=own.n_layer, d_model=own.n_embd, n_ctx=own.n_positions, d_head=own.n_embd // own.n_head,
        n_heads=own.n_head, d_mlp=4 * own.n_embd, d_vocab=own.vocab_size, act_fn="gelu_new", normalization_type="LN",
        eps=own.layer_norm_epsilon, device="cpu", model_name="gpt2",
    )  # fmt: skip
    paths = {i: str(folder / "transcoders" / f"layer_{i}.safetensors") for i in range(own.n_layer)}
    transcoders = load_transcoder_set(
        paths, "random", "mlp.hook_in", "hook_mlp_out", device=torch.device("cpu"), lazy_encoder=False,
        lazy_decoder=False,
    )  # fmt: skip
    replacement = TransformerLensReplacementModel.from_config(config, transcoders)
    state = convert_gpt2_weights(model, config)
    lacking, _ = replacement.load_state_dict(
        {name.replace(".mlp.", ".mlp.old_mlp."): value for name, value in state.items()}, strict=False
    )
    # the unembedding stands in a wrapper as well
    replacement.unembed.old_unembed.W_U.data = state["unembed.W_U"]
    bias = state.get("unembed.b_U")
    replacement.unembed.old_unembed.b_U.data = torch.zeros(own.vocab_size) if bias is None else bias
    lost = [name for name in lacking if "transcoder" not in name and "unembed" not in name and "mask" not in name]
    lost = [name for name in lost if not name.endswith("IGNORE")]
    if lost:
        sys.exit(f"weights that were not loaded: {lost[:3]}")

    class Tokens:  # the graph holds the prompt's text, which needs a tokenizer
        all_special_ids = ()
        padding_side, vocab_size = "right", own.vocab_size

        def decode(self, ids: object) -> str:
            return ""

    replacement.tokenizer = Tokens()
    prompt = torch.tensor(json.loads((folder / "prompt.json").read_text()))
    replacement.ensure_tokenized = lambda tokens: tokens
    for _ in sys.stdin:
        start = time.perf_counter()
        graph = attribute(prompt, replacement, batch_size=batch)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        prune_graph(graph)
        pruning = time.perf_counter() - start
        n = len(graph.selected_features)
        line = {"seconds": seconds, "prune_seconds": pruning, "features": n,
                "masses": graph.adjacency_matrix[:n].abs().sum(1).tolist()}  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
