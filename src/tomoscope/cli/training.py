"""`tomoscope features train`: dictionaries from a model and a corpus, many side by side from one harvest."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tomoscope.cli import common
from tomoscope.cli.common import MODEL_HELP, DeviceOption, DtypeOption, JsonOption, TracebackOption, told

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tomoscope.features.training import Figures, TrainConfig

SPOKEN = 10.0
"""Seconds between lines where there is no terminal."""


@told
def train(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    site: Annotated[
        list[str] | None,
        typer.Option("--site", "-s", help="A site or pattern that is read; given again, others.", show_default=False),
    ] = None,
    corpus: Annotated[
        str, typer.Option("--corpus", "-c", help="A file, a folder, or a data set of the hub.", show_default=False)
    ] = "",
    output: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the dictionaries; given again, training goes on.")
    ] = Path("dictionaries"),
    writes: Annotated[
        list[str] | None,
        typer.Option(
            "--writes", help="What is reconstructed, where not what is read: a transcoder.", show_default=False
        ),
    ] = None,
    join: Annotated[
        bool, typer.Option("--join", help="One dictionary of all sites (a crosscoder), instead of one for each.")
    ] = False,
    cross_layer: Annotated[
        bool, typer.Option("--cross-layer", help="One cross-layer transcoder of all sites and what they write.")
    ] = False,
    architecture: Annotated[
        str, typer.Option("--architecture", "-a", help="topk, batchtopk, matryoshka, jumprelu, relu, gated.")
    ] = "topk",
    latents: Annotated[str, typer.Option("--latents", help="How many; several, with commas, side by side.")] = "4096",
    k: Annotated[str, typer.Option("--k", help="Active latents of topk, batchtopk, matryoshka; several.")] = "32",
    coefficient: Annotated[str, typer.Option("--coefficient", help="Of the penalty of the others; several.")] = "5",
    target_l0: Annotated[
        float | None, typer.Option("--target-l0", help="Active latents that jumprelu aims at.", show_default=False)
    ] = None,
    skip: Annotated[bool, typer.Option("--skip-path", help="A linear path beside the latents (transcoders).")] = False,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, help="Tokens to train on; the corpus is read again.")
    ] = 10_000_000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Tokens of a step.")] = 4096,
    learning_rate: Annotated[float, typer.Option("--learning-rate", help="Of Adam.")] = 4e-4,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="Keep the activations in this folder, or read them from it.", show_default=False),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Tokens of a window of text.", show_default=False)
    ] = None,
    skip_first: Annotated[int, typer.Option("--skip-first", min=0, help="Leave out each text's first tokens.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of starting values and order.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Train sparse autoencoders, transcoders or crosscoders on a model's activations.

    Layers x sizes x sparsities are trained side by side from one harvest. Figures are shown and kept in
    `figures.jsonl`; a run that was stopped goes on from its last checkpoint.
    """
    from tomoscope.activations import ActivationStore, LiveSource, write_store
    from tomoscope.data import Corpus
    from tomoscope.errors import DataError
    from tomoscope.features.training import Training

    console = common.err()
    if not site:
        raise DataError("No site was named.", remedy="Give --site, for example --site layer.3.resid_post.")
    if not corpus:
        raise DataError("No corpus was named.", remedy="Give --corpus: a .txt, .jsonl or .parquet file, or a folder.")
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file, not a folder.", remedy="Give another --out.")
    texts = Corpus(corpus)
    console.print(Text.assemble(("tomoscope ", "bold"), f"opens {model or 'the embedded model'} ..."))
    subject = common.open_subject(model, device=device, dtype=dtype)
    reads = [one.name for one in subject.resolve(site)]
    written = [one.name for one in subject.resolve(writes)] if writes else []
    common_options: dict[str, Any] = {
        "architecture": architecture, "target_l0": target_l0, "skip": skip, "cross_layer": cross_layer, "batch": batch,
        "steps": max(1, tokens // batch), "learning_rate": learning_rate, "seed": seed, "dead_after": min(1_000_000,
        max(batch, tokens // 10)),
    }  # fmt: skip
    configs = make_configs(
        reads, written, joined=join or cross_layer, latents=numbers(latents, "--latents"), k=numbers(k, "--k"),
        coefficients=[float(c) for c in numbers(coefficient, "--coefficient", whole=False)],
        common_options=common_options,
    )  # fmt: skip
    sites = list(dict.fromkeys([*reads, *written]))
    with common.quiet_stdout(), common.terminable():
        if store is not None:
            write_store(
                subject, texts, sites, store, tokens=tokens, window=window, skip=skip_first, seed=seed,
                progress=teller(console),
            )  # fmt: skip
            source: Any = ActivationStore(store, seed=seed, sites=sites)
            source.verify()
        else:
            source = LiveSource(subject, texts, sites, tokens=tokens, window=window, skip=skip_first, seed=seed)
        training = Training(source, configs, folder=output)
        if training.step:
            console.print(Text(f"Resuming at step {training.step:,} of {training.steps:,}.", style="dim"))
        with View(console, configs, training.steps) as view:
            done = training.run(view.show)
        paths = save_all(done, output, subject.name, corpus)
    rows = view.rows()
    if as_json:
        common.print_json({"dictionaries": rows, "files": [str(path) for path in paths]})
        return
    if view.figures:
        common.out().print(view.table())
    for path in paths:
        common.out().print(Text.assemble("written: ", (str(path), "bold")), soft_wrap=True)


def teller(console: Console) -> Callable[[str, int, int | None], None]:
    """Says now and then how far a store is."""
    spoken = time.monotonic()

    def tell(what: str, done: int, total: int | None) -> None:
        nonlocal spoken
        if time.monotonic() - spoken > SPOKEN:
            spoken = time.monotonic()
            unit = "tokens" if what == "harvest" else "shards"
            of = "" if total is None else f" of {total:,}"
            console.print(Text(f"{what}: {done:,}{of} {unit}", style="dim"))

    return tell


def numbers(text: str, option: str, *, whole: bool = True) -> list[Any]:
    """Numbers with commas between them."""
    from tomoscope.errors import DataError

    try:
        found = [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError as error:
        raise DataError(
            f"{option} {text!r} is no list of numbers.", remedy=f"Give, for example, {option} 16,32."
        ) from error
    return found


def make_configs(
    reads: Sequence[str], writes: Sequence[str], *, joined: bool, latents: Sequence[int], k: Sequence[int],
    coefficients: Sequence[float], common_options: dict[str, Any],
) -> list[TrainConfig]:  # fmt: skip
    """Every combination of site, size and sparsity."""
    from tomoscope.errors import DataError
    from tomoscope.features.training.config import K_OF, TrainConfig

    if writes and len(writes) != len(reads) and not joined:
        raise DataError(
            f"{len(reads)} sites are read and {len(writes)} written.", remedy="Give as many --writes as --site."
        )
    places = [(tuple(reads), tuple(writes))] if joined else [
        ((read,), (writes[i],) if writes else ()) for i, read in enumerate(reads)
    ]  # fmt: skip
    chooses = common_options["architecture"] in K_OF
    knobs = [{"k": one} for one in k] if chooses else [{"coefficient": one} for one in coefficients]
    configs = []
    for (read, write), count, knob in product(places, latents, knobs):
        nested: dict[str, Any] = {}
        if common_options["architecture"] == "matryoshka":
            nested["widths"] = tuple(sorted({max(1, count // part) for part in (16, 8, 4, 2, 1)}))
        options: dict[str, Any] = {"reads": read, "writes": write, "latents": count, **knob, **nested, **common_options}
        configs.append(TrainConfig(**options))
    return configs


def save_all(done: Sequence[Any], output: Path, model: str, corpus: str) -> list[Path]:
    """Write every dictionary in its format."""
    from tomoscope.features import save_coder, save_transcoders
    from tomoscope.features.training import finished_coder, finished_cross_layer

    paths = []
    for one in done:
        folder = output / one.config.title.replace("/", "-")
        if one.config.cross_layer:
            save_transcoders(finished_cross_layer(one), folder)
        else:
            notes = {
                "model_name": model, "hook_name": "+".join(one.config.reads), "dataset_path": corpus,
                "training_architecture": one.config.architecture,
            }  # fmt: skip
            save_coder(finished_coder(one), folder, metadata=notes)
        paths.append(folder)
    return paths


class View:
    """Figures while training: a table that moves on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, configs: Sequence[TrainConfig], steps: int) -> None:
        self.console, self.configs, self.steps = console, configs, steps
        self.figures: Sequence[Figures] = ()
        self.step, self.rate, self.spoken = 0, 0.0, time.monotonic()
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> View:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, step: int, figures: Sequence[Figures], rate: float) -> None:
        """After each step."""
        self.step, self.figures, self.rate = step, figures, rate
        now = time.monotonic()
        if self.live is not None:
            if now - self.spoken > 0.25:
                self.spoken = now
                bar = ProgressBar(total=self.steps, completed=step, width=40)
                self.live.update(
                    Group(self.table(), bar, Text(f"step {step:,} of {self.steps:,}, {rate:,.0f} tokens/s"))
                )
        elif now - self.spoken > SPOKEN:
            self.spoken = now
            best = min(one.fvu for one in figures)
            self.console.print(
                Text(f"step {step:,} of {self.steps:,}: unexplained {best:.3f}, {rate:,.0f} tokens/s", style="dim")
            )

    def rows(self) -> list[dict[str, Any]]:
        """The last figures as plain values."""
        return [
            {
                "name": config.title, "step": one.step, "variance_unexplained": one.fvu, "l0": one.l0,
                "dead": one.dead, "losses": one.losses,
            }
            for config, one in zip(self.configs, self.figures, strict=False)
        ]  # fmt: skip

    def table(self) -> Table:
        """The figures of every dictionary."""
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("dictionary", "unexplained", "L0", "dead"):
            table.add_column(name, justify="left" if name == "dictionary" else "right")
        for config, one in zip(self.configs, self.figures, strict=False):
            table.add_row(common.plain(config.title), f"{one.fvu:.4f}", f"{one.l0:.1f}", f"{one.dead:.1%}")
        return table
