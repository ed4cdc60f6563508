"""`tomoscope features`: dictionaries of features, one command a verb."""

from __future__ import annotations

import typer

from tomoscope.cli.training import train

features = typer.Typer(
    name="features", help="Dictionaries of features: train them.", no_args_is_help=True, add_completion=False
)
features.command()(train)
