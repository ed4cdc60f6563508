"""The micro-world: a small world that is known entirely, and English text about it.

Design. `world` draws people, cities, countries and companies with their facts (world.json is the shipped one);
`relations` says how facts are worded and what is held out; `speech` writes claims, honest and lying speakers, users
with opinions, and reviews; `stories` writes the rest; `text` mixes them into documents. All of it is a function of a
seed. `training/` trains the embedded model on it; `phantoms.trained` opens that model and its siblings.
"""

from __future__ import annotations

from tomoscope.phantoms.world.relations import RELATIONS, Relation
from tomoscope.phantoms.world.speech import Said
from tomoscope.phantoms.world.text import KINDS, corpus, document
from tomoscope.phantoms.world.world import World, make_world, shipped_world

__all__ = ["KINDS", "RELATIONS", "Relation", "Said", "World", "corpus", "document", "make_world", "shipped_world"]
