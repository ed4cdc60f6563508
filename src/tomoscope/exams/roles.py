"""Which attention heads have the known roles? Previous token, duplicate token, induction, copying, name mover."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from pydantic import Field

from tomoscope.exams.exam import Context, Exam, Options
from tomoscope.exams.prompts import Ready, ready, speaks, words
from tomoscope.findings.figures import attention, heatmap
from tomoscope.findings.finding import Control, DataNote, Estimate, Finding
from tomoscope.findings.permutation import sign_flip_test
from tomoscope.findings.statistics import bootstrap_interval
from tomoscope.findings.verdict import Rule
from tomoscope.observe import HeadScores, attention_roles, copying_scores, name_movers

SAID = {
    "previous_token": "attends to the token before",
    "duplicate_token": "attends to earlier copies of the same token",
    "induction": "attends to the token after an earlier copy (induction)",
}


class RoleOptions(Options):
    """How many random sequences the scores are measured on."""

    sequences: int = Field(32, ge=8, le=100_000, description="Random sequences, repeated once.")
    permutations: int = Field(40, ge=19, le=10_000, description="Shuffles of the vocabulary for the copying score.")
    n: int = Field(64, ge=8, le=100_000, description="Prompts for the name movers.")


def _role(context: Context, scores: HeadScores) -> Finding:
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
            title=f"{scores.role.replace('_', '-')} score of every head", value_axis="attention weight",
            scale="sequential", marks=[(int(row), int(head))],
            caption="Mean attention on the role's keys over random sequences; the claim's head is outlined.",
        ),
    )  # fmt: skip
    ids = scores.sequences[int(measured[0])]
    pattern = context.subject.read([ids.tolist()], f"layer.{layer}.attn.pattern[head={head}]")
    picture = context.figure(
        f"{scores.role}_pattern",
        attention(
            next(iter(pattern.values()))[0][None].float().numpy(), tokens=words(context.subject, ids.tolist()),
            title=f"Head {layer}.{head} on a random sequence that repeats", heads=[f"{layer}.{head}"],
        ),
    )  # fmt: skip
    seed = context.seed_for(scores.role)
    share = "even attention" if scores.role == "previous_token" else "the same head where nothing repeats"
    return context.claim(
        scores.role, f"Head {layer}.{head} {SAID[scores.role]}.",
        estimate=bootstrap_interval(mine, seed=seed, unit="attention weight"),
        controls=[
            Control(
                name=share, estimate=bootstrap_interval(other, seed=seed, unit="attention weight"),
                description="Same pairs of positions on random tokens without repetition (for previous-token: "
                            "uniform).",
            ),
            Control(
                name="uniform attention", estimate=Estimate.exact(float(scores.uniform[row])),
                description="Attention spread evenly over all allowed keys.",
            ),
        ],
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
    # the best of all heads is compared with the best of all heads under each shuffle: the search is in the control
    best = control.reshape(-1, control.shape[-1]).max(0)
    grid = context.figure(
        "copying_scores",
        heatmap(
            values, columns=range(values.shape[1]), row_axis="layer", column_axis="head", value_axis="copying score",
            title="Copying score of every head", marks=[(int(layer), int(head))],
            caption="Sum of the eigenvalues of W_E W_V W_O W_U over the sum of their moduli: 1 copies, -1 suppresses.",
        ),
    )  # fmt: skip
    top = float(values[layer, head])
    return context.claim(
        "copying", f"Head {layer}.{head} copies: what it attends to, it raises in the output.",
        estimate=Estimate.exact(top, unit="copying score"),
        controls=[
            Control(
                name=f"best of all heads, {len(best)} shuffled vocabularies",
                estimate=Estimate.exact(float(best.max()), unit="copying score"),
                description="The largest score of any head under any shuffle of the unembedding's tokens.",
            )
        ],
        rule="copying",
        sites=[f"layer.{layer}.attn.z[head={head}]"], figures=[grid], measured_on=DataNote(name="weights alone"),
    )  # fmt: skip


def _name_mover(context: Context) -> Finding:
    claim = "A head moves the right name from where it stands to the end of the prompt (name mover)."
    task = ready(context, "ioi", context.options.n) if context.subject.tokenizer is not None else "no tokenizer"
    if not isinstance(task, Ready):
        return context.not_measured("name_mover", claim, task)
    if task.why_not:
        return context.not_measured("name_mover", claim, task.why_not)
    scores = name_movers(context.subject, task.raw, seed=context.seed_for("name movers"))
    right, wrong = scores.attention.double().numpy(), scores.attention_wrong.double().numpy()
    copies = scores.copying.double().numpy() - scores.copying_control.double().numpy()
    chosen, measured = context.halves(task.clusters)
    lead = (right - wrong)[..., chosen].mean(-1) * np.clip(copies[..., chosen].mean(-1), 0, 1)
    row, head = np.unravel_index(int(lead.argmax()), lead.shape)
    layer = scores.layers[int(row)]
    grid = context.figure(
        "name_mover_scores",
        heatmap(
            (right - wrong).mean(-1), rows=scores.layers, columns=range(right.shape[1]), row_axis="layer",
            column_axis="head", title="Attention from the end to the right name, less to the wrong one",
            value_axis="attention weight", marks=[(int(row), int(head))],
        ),
    )  # fmt: skip
    seed = context.seed_for("name mover")
    unit = "attention weight"
    clusters = [task.clusters[i] for i in measured]
    return context.claim(
        "name_mover", f"Head {layer}.{head} is a name mover: at the end it attends to the right name and writes it.",
        estimate=bootstrap_interval(right[row, head, measured], seed=seed, clusters=clusters, unit=unit),
        controls=[
            Control(
                name="attention to the wrong name", description="The same head on the name that is not the answer.",
                estimate=bootstrap_interval(wrong[row, head, measured], seed=seed, clusters=clusters, unit=unit),
            )
        ],
        p_value=sign_flip_test(
            (right - wrong)[row, head, measured], seed=context.seed_for("name mover test"), clusters=clusters
        ),
        test="paired sign-flip test over prompts", rule="attention", positions="last token", figures=[grid],
        sites=[f"layer.{layer}.attn.pattern[head={head}]"], chosen_on=task.note("half A", chosen),
        measured_on=task.note("half B", measured),
    )  # fmt: skip


def run(context: Context) -> Iterator[Finding]:
    """One claim a role, for the head that scores highest on half of the sequences."""
    roles = attention_roles(context.subject, sequences=context.options.sequences, seed=context.seed_for("sequences"))
    for done, scores in enumerate(roles.values()):
        context.progress(done, 5, scores.role)
        yield _role(context, scores)
    context.progress(3, 5, "copying")
    yield _copying(context)
    context.progress(4, 5, "name movers")
    yield _name_mover(context)
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
