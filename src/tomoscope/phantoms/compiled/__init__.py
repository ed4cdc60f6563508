"""Small programs compiled to exact transformer weights, with the true circuit, edge by edge.

A program in the manner of RASP (Weiss et al. 2021) is compiled, in the manner of Tracr (Lindner et al. 2023,
arXiv:2301.05062; nothing of it is used), to a GPT2LMHeadModel that computes it exactly. A user's own, in three lines:

    opposite = sequence_map(lambda n, index: n - 1 - index, length, indices)
    reverse = aggregate(select(indices, opposite, operator.eq), tokens)
    compiled = compile_program(reverse, vocabulary="abc", max_length=5)

`compiled` is a specimen: `compiled.subject` has every site, `compiled.circuit.edges` the truth, `compiled.answers(...)`
what the weights say and `compiled.expected(...)` what the program means.

- A stream of named directions, one a category or number; LayerNorm is made linear by two very large constant dimensions
  (`stream`). Answers are within 1e-7 of exact in float64.
- Each aggregate is a head, each map neurons, a selector's width a head and neurons (`lower`, `neurons`); BOS is what is
  attended where nothing is selected.
- The circuit follows from who reads what whom wrote (`circuit`). Weights for a case are made only where the case can
  come, so that cutting any edge changes some answer.
- Every compilation is checked against an interpreter that knows no weights (`interpret`).

How they can mislead: see `specimens`; compiled weights are cleaner than trained ones.
"""

from __future__ import annotations

from tomoscope.phantoms.compiled.circuit import Circuit
from tomoscope.phantoms.compiled.compiler import Compiled, compile_program
from tomoscope.phantoms.compiled.rasp import (
    Selector,
    SOp,
    aggregate,
    constant,
    indices,
    length,
    select,
    select_all,
    selector_width,
    sequence_map,
    tokens,
)
from tomoscope.phantoms.compiled.specimens import PHANTOMS, make_pairs

__all__ = [
    "PHANTOMS",
    "Circuit",
    "Compiled",
    "SOp",
    "Selector",
    "aggregate",
    "compile_program",
    "constant",
    "indices",
    "length",
    "make_pairs",
    "select",
    "select_all",
    "selector_width",
    "sequence_map",
    "tokens",
]
