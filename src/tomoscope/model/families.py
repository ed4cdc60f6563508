"""What neither a model's declarations nor the probe can tell. A table, no logic.

A family is here only if opening it without a line here would give a wrong or missing site.
"""

from __future__ import annotations

# Attention modules that compute attention inline are recognised by their name; these names are not attention.
NOT_ATTENTION = ("norm", "dropout", "ln_")

# A block's own attribute that names its attention, where the class's or attribute's name says nothing of it.
ATTENTION_NAMES = ("attn", "attention", "self_attn", "self_attention")

# How a fused query-key-value projection lays its output out; tried in this order, the first that gives back the values
# that attention was seen to receive is taken. "blocks": all q, all k, all v. "heads": per head q, k, v. "groups": per
# key-value head its queries, then k, then v.
FUSED_LAYOUTS = ("blocks", "heads", "groups")

QUERY_NAMES = ("q_proj", "query", "q_lin", "q", "wq")
KEY_NAMES = ("k_proj", "key", "k_lin", "k", "wk")
VALUE_NAMES = ("v_proj", "value", "v_lin", "v", "wv")
FUSED_NAMES = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "W_pack", "in_proj")
GATE_NAMES = ("gate_proj", "w1", "wi_0", "gate")

# What configs call the soft-cap of the final logits, and that of attention scores.
SOFTCAP_NAMES = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
ATTENTION_SOFTCAP_NAMES = ("attn_logit_softcapping",)

# Families whose streams are not a sum of what their modules return: what a person should know instead of a list of
# errors.
UNSOLVED = {
    "deepseek_v4": "the block carries several streams (hyper-connections)",
    "hy_v4": "the block carries several streams (hyper-connections)",
    "qwen4_exp": "the block carries several streams (hyper-connections)",
    "gemma3n": "the block mixes several streams (AltUp, LAuReL)",
    "gemma3n_text": "the block mixes several streams (AltUp, LAuReL)",
    "longcat_flash": "the block holds two attentions and a shortcut mixture of experts",
    "doge": "the residual is multiplied by a learned weight that no module returns",
    "hrm_text": "the blocks are nested stacks run several times",
    "prophetnet": "the decoder predicts several streams of future tokens",
}
