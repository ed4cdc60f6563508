"""Planted phantoms: weights set by hand in real architectures, so that what is inside is known by construction.

The design, one file an idea:

- `host`: an empty GPT-2 or Llama and the means to wire heads and neurons; `spaces`: the orthogonal parts of its
  stream; `words`: a tokenizer the field's tasks accept; `cards`: what the cards share.
- `circuit`, `induction`: an induction circuit, beside scrambled weights and a twin whose first head is severed.
- `duplicate`: a duplicate-token head that copies.
- `hops`: a feature circuit of two hops with its dictionary: a country's neuron, a head, its capital's neuron.
- `backdoor`: the same host with one neuron that two words set off.
- `statements`, `concepts`: classes of words along known directions, used and unused, one with a known best accuracy.
- `superposition`: more sparse features than dimensions, with the dictionary.
- `stimuli`, `curves`: a small CNN of edges, colours and curves.

Each file says how its phantom can mislead. What holds for all: planted parts are cleaner and stand more alone than
learned ones, so an exam that fails here fails, and one that passes here has passed the easiest case.
"""

from __future__ import annotations

from tomoscope.phantoms.phantom import Phantom
from tomoscope.phantoms.planted import backdoor, concepts, curves, duplicate, hops, induction, superposition

__all__ = ["PHANTOMS"]

PHANTOMS: tuple[Phantom, ...] = (
    *induction.PHANTOMS,
    *duplicate.PHANTOMS,
    *backdoor.PHANTOMS,
    *hops.PHANTOMS,
    *concepts.PHANTOMS,
    *superposition.PHANTOMS,
    *curves.PHANTOMS,
)
"""The planted phantoms."""
