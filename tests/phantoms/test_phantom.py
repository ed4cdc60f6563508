"""The contract of phantoms: cards read back equal, names are looked up with the nearest."""

from __future__ import annotations

import pytest

from tomoscope.errors import DataError
from tomoscope.phantoms import Card, Known, Phantom
from tomoscope.phantoms.registry import Registry

CARD = Card("p", 3, "é <b>", (Known("ability", {"task": "ioi"}), Known("disease", {"name": "liar"}, holds=False)))


def test_a_card_reads_back_equal():
    assert Card.from_json(CARD.to_json()) == CARD
    assert [known.holds for known in CARD.of("disease")] == [False]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"name": "x"}', '{"name": "x", "seed": "a", "description": "", "known": []}']
)
def test_what_is_no_card_is_refused(text):
    with pytest.raises(DataError, match="no phantom's card"):
        Card.from_json(text)


def test_the_registry_names_the_nearest():
    registry = Registry(())
    one = Phantom("induction_gpt2", "planted", "t", build=lambda seed: None, null=lambda seed: None)
    registry.register(one)
    registry.register(one)
    assert registry.find("induction_gpt2") is one
    with pytest.raises(DataError, match="induction_gpt2"):
        registry.find("induction_gpt")
    with pytest.raises(DataError, match="two phantoms"):
        registry.register(Phantom("induction_gpt2", "planted", "t", build=lambda s: None, null=lambda s: None))
