"""`tomoscope features label | search | show`: what is done with dashboards that were made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, JsonOption, TracebackOption, told

if TYPE_CHECKING:
    from tomoscope.features import Hit, ScoredLabel

FolderArgument = Annotated[Path, typer.Argument(help="The folder of `features dashboards`.")]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP, show_default=False)]
LABELS = "labels.jsonl"


@told
def label(
    folder: FolderArgument,
    model: ModelOption = None,
    latents: Annotated[
        str, typer.Option("--latents", help="17, 3-20 or 1,5,9; the most frequent by default.", show_default=False)
    ] = "",
    n: Annotated[int, typer.Option("--n", min=1, help="How many, where none are named.")] = 50,
    explainer: Annotated[str, typer.Option("--explainer", help="rules, local, or the address of a server.")] = "rules",
    name: Annotated[str, typer.Option("--name", help="The model's name on the server.", show_default=False)] = "",
    key: Annotated[
        str, typer.Option("--key", help="Environment variable that holds the server's key.", show_default=False)
    ] = "",
    price: Annotated[float, typer.Option("--price", min=0, help="Dollars per million tokens, in and out.")] = 0.0,
    coder: Annotated[
        Path | None, typer.Option("--coder", "-c", help="The dictionary, for interventions.", show_default=False)
    ] = None,
    contexts: Annotated[int, typer.Option("--contexts", min=16, help="Texts a label is scored on.")] = 200,
    shuffles: Annotated[int, typer.Option("--shuffles", min=1, help="Other features' labels as the control.")] = 3,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and leave.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all draws.")] = 0,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Label features and score each label on other texts, beside the labels of other features.

    Labels that do not beat that control stay unlabelled, with the reason. Results are kept in labels.jsonl, and a run
    that was stopped goes on; the index is made again with the labels.
    """
    from tomoscope.features import (
        Cached,
        Endpoint,
        FeatureBook,
        Labeller,
        LocalModel,
        ModelExplainer,
        ModelJudge,
        RuleExplainer,
        RuleJudge,
        build_index,
        import_coder,
        index_labels,
        plan_labels,
        read_labels,
        say_of,
    )

    book = FeatureBook.open(folder)
    wanted = chosen_latents(book, latents, n)
    if explainer != "rules":
        told_before = plan_labels(len(wanted), contexts=contexts, shuffles=shuffles, price=(price, price))
        if plan or not as_json:
            common.err().print(
                f"{told_before.features:,} features: {told_before.requests:,} requests, {told_before.tokens_in:,} "
                f"tokens in, {told_before.tokens_out:,} out, {told_before.cost:,.2f} dollars",
                soft_wrap=True,
            )
        if plan:
            if as_json:
                common.print_json(vars(told_before))
            return
    subject = common.open_subject(model, device=device)
    say = say_of(subject.tokenizer)
    made: Any = RuleExplainer(say, lexicon_of(model))
    judge: Any = RuleJudge()
    if explainer != "rules":
        inner: Any = LocalModel(subject) if explainer == "local" else Endpoint(explainer, name, key=key)
        cached = Cached(inner, folder / "answers.jsonl")
        made, judge = ModelExplainer(cached, say), ModelJudge(cached, say)
    dictionary = None if coder is None else import_coder(coder)
    labeller = Labeller(
        book, made, judge, subject if dictionary else None, dictionary, active=contexts // 2, silent=contexts // 2,
        shuffles=shuffles, seed=seed,
    )  # fmt: skip
    found = []
    for one in labeller.run(wanted, folder / LABELS):
        found.append(one)
        if not as_json:
            common.out().print(label_line(one), soft_wrap=True)
    build_index(folder, index_labels(read_labels(folder / LABELS)))
    if as_json:
        common.print_json([one.model_dump(mode="json") for one in found])


def chosen_latents(book: Any, said: str, n: int) -> list[int]:
    """Features by numbers and ranges, or the n that fire most often."""
    import numpy as np

    from tomoscope.errors import DataError

    if not said:
        counts = book.column("fires")
        return [int(i) for i in np.argsort(-counts, kind="stable")[:n] if counts[i]]
    out: list[int] = []
    for part in said.split(","):
        low, _, high = part.strip().partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            raise DataError(f"{part!r} names no features.", remedy="Write 17, 3-20 or 1,5,9.")
        out += range(int(low), int(high or low) + 1)
    if max(out) >= book.n_features:
        raise DataError(f"There is no feature {max(out)}: there are {book.n_features}.")
    return out


def lexicon_of(model: str | None) -> dict[str, set[str]]:
    """What words are, where that is known: the micro-world's for the embedded model."""
    if model is not None:
        return {}
    from tomoscope.exams.world_words import world_lexicon

    return world_lexicon()


def label_line(one: ScoredLabel) -> Text:
    """A label in one line."""
    if one.label:
        text = Text(f"{one.latent:>8}  ", style="dim").append(common.plain(one.label), style="bold")
        return text.append(f"  detection {one.detection}, others {one.control['detection']}", style="dim")
    return Text(f"{one.latent:>8}  unlabelled: {common.plain(one.why_not)}", style="dim")


@told
def search(
    folder: FolderArgument,
    about: Annotated[str, typer.Argument(help="Words that labels say.", show_default=False)] = "",
    token: Annotated[str, typer.Option("--token", help="Features that raise this token.", show_default=False)] = "",
    text: Annotated[str, typer.Option("--text", help="Features active on this text.", show_default=False)] = "",
    coder: Annotated[
        Path | None, typer.Option("--coder", "-c", help="The dictionary, with --text.", show_default=False)
    ] = None,
    model: ModelOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Features shown.")] = 20,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Find features: by what their labels say, by the token that they raise, or active on a text."""
    from tomoscope.errors import DataError, PromptError
    from tomoscope.features import FeatureBook, FeatureIndex, import_coder

    if sum(map(bool, (about, token, text))) != 1:
        raise DataError("Search by one of: words of labels, --token, --text.")
    index = FeatureIndex(folder)
    if about:
        hits = index.about(about, limit)
    else:
        subject = common.open_subject(model, device=device)
        if token:
            ids = subject.tokenizer(token, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise PromptError(f"{token!r} is {len(ids)} tokens.", remedy="Give one (with its leading space).")
            hits = index.raising(ids[0], limit)
        else:
            if coder is None:
                raise DataError("Features active on a text need the dictionary.", remedy="Give --coder.")
            site = FeatureBook.open(folder).manifest["site"]
            x = subject.read(text, site)[site][0].float().flatten(1)
            hits = index.active(import_coder(coder).sparse(x), limit)
    if as_json:
        common.print_json([vars(hit) for hit in hits])
        return
    common.out().print(hit_table(hits) if hits else "no feature")


def hit_table(hits: list[Hit]) -> Table:
    """Hits, one a row."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("feature", "value", "fires", "label"):
        table.add_column(heading, justify="left" if heading == "label" else "right")
    for hit in hits:
        table.add_row(
            str(hit.latent), f"{hit.value:.3g}", f"{hit.fires:,}", Text(common.plain(hit.label or "unlabelled"))
        )
    return table


@told
def show(
    folder: FolderArgument,
    latent: Annotated[int, typer.Argument(min=0, help="Which feature.")],
    model: ModelOption = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write the feature's page there.", show_default=False)
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show one feature: its numbers, its label, the texts on which it is strongest; or write its page."""
    from tomoscope.features import FeatureBook, read_labels
    from tomoscope.findings.files import write_bytes
    from tomoscope.scan.feature_page import feature_page

    book = FeatureBook.open(folder)
    subject = common.open_subject(model, device=device)
    known = read_labels(folder / LABELS) if (folder / LABELS).exists() else {}
    own = known.get(latent)
    card = book.card(latent, subject.tokenizer, label=own.label if own else "")
    if own is not None:
        card["score"] = own.detection.value
    if page is not None:
        write_bytes(page, feature_page(card).encode("utf-8"))
        common.err().print(Text(f"written: {page}"), soft_wrap=True)
    if as_json:
        common.print_json(card)
        return
    console = common.out()
    console.print(Text(f"Feature {latent}: {common.plain(card['label'] or 'unlabelled')}", style="bold"))
    console.print(
        f"fires on {card['fires']:,} of {card['n_tokens']:,} tokens, at most {card['max']:.4g}; tokens: entropy "
        f"{card['token_entropy']:.2f} bits, the commonest {card['single_token']:.0%}",
        soft_wrap=True,
    )
    for name, sign in (("raised", "raises"), ("lowered", "lowers")):
        console.print(Text(f"{sign}: " + common.plain(" ".join(map(repr, card[f"{name}_text"])))), soft_wrap=True)
    for context in card["contexts"].get("top", [])[:8]:
        line = Text("  ")
        for i, (word, value) in enumerate(zip(context["tokens"], context["values"], strict=True)):
            style = "bold red" if i == context["peak"] else "yellow" if value > 0 else ""
            line.append(common.plain(word).replace("\n", "⏎"), style=style)
        console.print(line, soft_wrap=True)
