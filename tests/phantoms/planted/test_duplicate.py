"""The duplicate-token head attends to the earlier copy, copies it, and is the only one that does."""

from __future__ import annotations

import pytest

from tests.phantoms.planted.conftest import same_weights
from tomoscope.data import TASKS
from tomoscope.exams.exam import Context
from tomoscope.exams.ready import ready
from tomoscope.exams.registry import EXAMS
from tomoscope.model import zero
from tomoscope.observe import attention_roles, copying_scores
from tomoscope.observe.heads import repeated_tokens
from tomoscope.phantoms import PHANTOMS
from tomoscope.phantoms.planted import duplicate

SEEDS = (0, 1, 2)


def head_of(specimen):
    role = next(k.value for k in specimen.card.of("head_role") if k.value["role"] == "duplicate_token")
    return tuple(role["heads"][0])


def stuttered(subject, edits=()):
    """Share of the second copy's tokens that are said again at once."""
    rows = repeated_tokens(subject, sequences=16, length=24, seed=3)
    top = subject.run(rows.tolist(), edits=edits).logits.argmax(-1)
    return float((top[:, 24:] == rows[:, 24:]).float().mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_one_head_has_the_role_and_copies(form, seed):
    specimen = duplicate.build(form, seed)
    head, roles = head_of(specimen), attention_roles(specimen.subject)
    scores = roles["duplicate_token"].values.mean(-1)
    assert scores[head] > 0.97
    scores[head] = 0
    assert scores.max() < 0.2
    assert roles["duplicate_token"].control.mean(-1)[head] < 0.05
    assert max(roles[role].values.mean(-1).max() for role in ("previous_token", "induction")) < 0.2
    copying = copying_scores(specimen.subject).values
    assert copying[head] > 0.95
    assert stuttered(specimen.subject) > 0.99
    assert stuttered(specimen.subject, [zero(f"layer.{head[0]}.attn.z[head={head[1]}]")]) < 0.1


def test_it_does_no_task(form):
    specimen = duplicate.build(form, 1)
    context = Context(specimen.subject, EXAMS["observe.abilities"], scan_seed=2)
    for known in specimen.card.of("ability"):
        assert not known.holds
    for name in TASKS:
        assert not ready(context, name, 128).done, name


def test_the_null_has_no_such_head_and_builds_are_equal(form):
    null = PHANTOMS[f"duplicate_{form}"].null(0)
    assert attention_roles(null.subject)["duplicate_token"].values.mean(-1).max() < 0.3
    one, again, other = (duplicate.build(form, seed) for seed in (4, 4, 5))
    assert same_weights(one.subject.model, again.subject.model)
    assert not same_weights(one.subject.model, other.subject.model)
