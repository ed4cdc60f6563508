"""The names of axes, fixed once and used by every array, docstring and record.

batch      one prompt or image of the batch
position   token (or image patch) of the sequence, in the order of the prompt; padding is masked, not removed
query, key position in its role inside attention: query attends to key
head       attention head; `kv_head` where keys and values are shared between heads
head_dim   coordinate inside a head
d_model    coordinate of the residual stream
d_mlp      neuron of an MLP's hidden layer
expert     expert of a mixture
vocab      token of the vocabulary
layer      block, from 0 at the input
channel, height, width   of a convolutional feature map
"""

from __future__ import annotations

BATCH = "batch"
POSITION = "position"
QUERY = "query"
KEY = "key"
HEAD = "head"
KV_HEAD = "kv_head"
HEAD_DIM = "head_dim"
D_MODEL = "d_model"
D_MLP = "d_mlp"
EXPERT = "expert"
VOCAB = "vocab"
LAYER = "layer"
CHANNEL = "channel"
HEIGHT = "height"
WIDTH = "width"
