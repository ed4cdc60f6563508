"""Which attention heads have the known roles? Previous token, duplicate token, induction, copying, name mover.

Each claim is about the head that scores highest on one half of the data, measured on the other half against the same
head where the role has nothing to hold on to. How it can mislead: see `observe.heads`; attending is not using, and
random tokens are not text.

Steps: three roles from one pass over random repeated sequences; copying from the weights, with the search over heads
repeated in every shuffle; name movers on IOI prompts, where the model does that task.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.places import shown_pattern
from tomoscope.exams.prompts import speaks, words
from tomoscope.exams.ready import UNABLE, Ready, able, attempt, percent
from tomoscope.findings.figures import attention, heatmap
from tomoscope.findings.finding import Control, DataNote, Estimate, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.observe import HeadScores, attention_roles, copying_scores, name_movers

SAID = {
    "previous_token": ("previous-token", "the token before"),
    "duplicate_token": ("duplicate-token", "the earlier copy of the same token"),
    "induction": ("induction", "the token after an earlier copy"),
}
CONTROLS = {
    "previous_token": ("even attention", "The same pairs of positions, attention spread evenly over the keys allowed."),
    "duplicate_token": ("where nothing repeats", "The same head and pairs of positions on tokens that do not repeat."),
    "induction": ("where nothing repeats", "The same head and pairs of positions on tokens that do not repeat."),
}


class RoleOptions(Options):
    """How many random sequences the scores are measured on."""

    sequences: int = Field(32, ge=8, le=100_000, description="Random sequences, repeated once.")
    permutations: int = Field(40, ge=19, le=10_000, description="Shuffles of the vocabulary for the copying score.")
    n: int = Field(64, ge=8, le=100_000, description="Prompts for the name movers.")


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _role(context: Context, scores: HeadScores) -> Finding:
    kind, target = SAID[scores.role]
    values, control = scores.values.double().numpy(), scores.control.double().numpy()
    chosen, measured = context.halves(values.shape[-1])
    lead = (values - control)[..., chosen].mean(-1)
    row, head = np.unravel_index(int(lead.argmax()), lead.shape)
    layer = scores.layers[int(row)]
    mine, other = values[row, head, measured], control[row, head, measured]
    grid = context.figure(
        f"{scores.role}_scores",
        heatmap(
            values.mean(-1), rows=scores.layers, columns=range(values.shape[1]), row_axis="layer", column_axis="head",
            title=f"{kind.capitalize()} score of every head", value_axis="attention weight",
            scale="sequential", marks=[(int(row), int(head))],
            caption="Mean attention on the role's keys over random sequences; the claim's head is outlined.",
        ),
    )  # fmt: skip
    ids = scores.sequences[int(measured[0])]
    pattern = context.subject.read([ids.tolist()], f"layer.{layer}.attn.pattern[head={head}]")
    said = "" if scores.role == "previous_token" else ", said twice"
    picture = context.figure(
        f"{scores.role}_pattern",
        attention(
            next(iter(pattern.values()))[0][None].float().numpy(), tokens=words(context.subject, ids.tolist()),
            title=f"Head {layer}.{head} on random tokens{said}", heads=[f"{layer}.{head}"],
        ),
    )  # fmt: skip
    seed = context.seed_for(scores.role)
    name, description = CONTROLS[scores.role]
    controls = [
        Control(
            name=name, estimate=bootstrap_interval(other, seed=seed, unit="attention weight"), description=description
        )
    ]
    if scores.role != "previous_token":
        controls.append(
            Control(
                name="even attention", description=CONTROLS["previous_token"][1],
                estimate=Estimate.exact(float(scores.uniform[row]), unit="attention weight"),
            )
        )  # fmt: skip
    return context.claim(
        scores.role,
        f"Head {layer}.{head} is {_article(kind)} head: {percent(float(mine.mean()))} of its attention is on {target}.",
        estimate=bootstrap_interval(mine, seed=seed, unit="attention weight"), controls=controls,
        p_value=sign_flip_test(mine - other, seed=context.seed_for(f"{scores.role} test")),
        test="paired sign-flip test over sequences", rule="attention",
        sites=[f"layer.{layer}.attn.pattern[head={head}]"], positions="all", figures=[grid, picture],
        chosen_on=DataNote(name="random sequences, half A", n=len(chosen)),
        measured_on=DataNote(name="random sequences, half B", n=len(measured)),
    )  # fmt: skip


def _copying(context: Context) -> Finding:
    scores = copying_scores(
        context.subject, permutations=context.options.permutations, seed=context.seed_for("copying")
    )
    values, control = scores.values.double().numpy(), scores.control.double().numpy()
    layer, head = np.unravel_index(int(values.argmax()), values.shape)
    layers = scores.layers
    # the best of all heads is compared with the best of all heads under each shuffle: the search is in the control
    best = control.reshape(-1, control.shape[-1]).max(0)
    grid = context.figure(
        "copying_scores",
        heatmap(
            values, rows=layers, columns=range(values.shape[1]), row_axis="layer", column_axis="head",
            value_axis="copying score",
            title="Copying score of every head", marks=[(int(layer), int(head))],
            caption="Sum of the eigenvalues of W_E W_V W_O W_U over the sum of their moduli: 1 copies, -1 suppresses.",
        ),
    )  # fmt: skip
    top = float(values[layer, head])
    return context.claim(
        "copying",
        f"Head {layers[int(layer)]}.{head} copies: what it attends to, it raises in the output (score {top:.2f}).",
        estimate=Estimate.exact(top, unit="copying score"),
        controls=[
            Control(
                name=f"best of all heads, {len(best)} shuffled vocabularies",
                estimate=Estimate.exact(float(best.max()), unit="copying score"),
                description="The largest score of any head under any shuffle of the unembedding's tokens.",
            )
        ],
        rule="copying",
        sites=[f"layer.{layers[int(layer)]}.attn.z[head={head}]"], figures=[grid],
        measured_on=DataNote(name="weights alone"),
    )  # fmt: skip


def _name_mover(context: Context, task: Ready) -> Finding:
    scores = name_movers(context.subject, task.raw, seed=context.seed_for("name movers"))
    moved, wrong = scores.values.double().numpy(), scores.attention_wrong.double().numpy()
    even = scores.control.double().numpy()
    chosen, measured = context.halves(task.clusters)
    lead = (moved - wrong)[..., chosen].mean(-1)
    row, head = (int(i) for i in np.unravel_index(int(lead.argmax()), lead.shape))
    layer = scores.layers[row]
    right = scores.attention.double().numpy()
    grid = context.figure(
        "name_mover_scores",
        heatmap(
            (right - wrong).mean(-1), rows=scores.layers, columns=range(right.shape[1]), row_axis="layer",
            column_axis="head", title="Attention from the end to the right name, less that to the wrong one",
            value_axis="attention weight", marks=[(row, head)],
            caption="Mean over prompts of indirect object identification; the claim's head is outlined.",
        ),
    )  # fmt: skip
    seed, unit = context.seed_for("name mover"), "attention that moves the name"
    clusters = [task.clusters[i] for i in measured]
    mine, others = moved[row, head, measured], (wrong[row, head, measured], even[row, head, measured])
    test = context.seed_for("name mover test")
    return context.claim(
        "name_mover",
        f"Head {layer}.{head} is a name mover: from the end of the prompt it puts "
        f"{percent(float(right[row, head, measured].mean()))} of its attention on the right name and "
        f"{percent(float(others[0].mean()))} on the wrong one, and what it reads there says the name in "
        f"{percent(float(scores.copying.double().numpy()[row, head, measured].mean()))} of prompts.",
        estimate=bootstrap_interval(mine, seed=seed, clusters=clusters, unit=unit),
        controls=[
            Control(
                name="attention to the wrong name", description="The same head on the name that is not the answer.",
                estimate=bootstrap_interval(others[0], seed=seed, clusters=clusters, unit=unit),
            ),
            Control(
                name="even attention, another name", estimate=bootstrap_interval(
                    others[1], seed=seed, clusters=clusters, unit=unit
                ),
                description="Even attention, where what is read says the name of another prompt.",
            ),
        ],
        p_value=max(sign_flip_test(mine - other, seed=test, clusters=clusters) for other in others),
        test="the larger p of two paired sign-flip tests over prompts, against each control", rule="attention",
        positions="last token", figures=[grid, *shown_pattern(context, "ioi", task, layer, head, measured)],
        sites=[f"layer.{layer}.attn.pattern[head={head}]"], chosen_on=task.note("half A", chosen),
        measured_on=task.note("half B", measured),
    )  # fmt: skip


def run(context: Context) -> Iterator[Finding]:
    """One claim a role, for the head that scores highest on half of the sequences."""
    context.progress(0, 5, "random sequences")
    seed = context.seed_for("sequences")
    try:
        roles = attention_roles(context.subject, sequences=context.options.sequences, seed=seed)
    except UNABLE as error:
        roles = {}
        for role, (kind, _) in SAID.items():
            yield context.not_measured(role, f"One head is {_article(kind)} head.", error.what)
    for done, scores in enumerate(roles.values()):
        context.progress(done, 5, scores.role)
        yield _role(context, scores)
    context.progress(3, 5, "copying")
    yield attempt(context, "copying", "One head copies what it attends to.", lambda: _copying(context))
    context.progress(4, 5, "name movers")
    claim = "A head moves the right name from where it stands to the end of the prompt (name mover)."
    if context.subject.tokenizer is None:
        yield context.not_measured("name_mover", claim, "the model was opened without a tokenizer")
    else:
        task = able(context, "ioi", context.options.n)
        if isinstance(task, str):
            yield context.not_measured("name_mover", claim, task)
        else:
            yield attempt(context, "name_mover", claim, lambda: _name_mover(context, task))
    context.progress(5, 5)


HEAD_ROLES = Exam(
    name="observe.head_roles",
    title="Known roles of attention heads",
    question="Which heads attend to the previous token, to duplicates, by induction, and which copy names?",
    run=run,
    rule={
        "attention": Rule(direction="greater", minimum=0.2),
        "copying": Rule(
            direction="greater",
            minimum=0.1,
            alpha=None,
            note="A property of the weights, without sampling; the search over heads is repeated in every shuffle.",
        ),
    },
    options=RoleOptions,
    presets={"quick": {"permutations": 20}, "deep": {"sequences": 128, "permutations": 200, "n": 256}},
    applies=lambda subject: speaks(subject) or ("" if subject.facts.n_heads else "the model has no attention heads"),
    method=(
        "Random tokens, repeated once, are shown to the model (Olsson et al. 2022); a head's score is its mean "
        "attention on "
        "the keys that the role asks for. Copying is read from the weights' eigenvalues (Elhage et al. 2021), name "
        "movers "
        "from IOI prompts (Wang et al. 2022)."
    ),
    cost=2.0,
)
