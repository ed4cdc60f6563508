"""The command line's page, from the commands' own options and help texts."""

from __future__ import annotations

from typing import Any

from builder.prose import docstring, escape


def command_tree() -> dict[str, Any]:
    """The commands by name, as click sees them, those of a group as "group command"; "" is the program itself."""
    import typer

    from tomoscope.cli.main import app

    root: Any = typer.main.get_command(app)
    tree = {"": root}
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        tree |= {name: command} if inner is None else {f"{name} {verb}": one for verb, one in inner.items()}
    return tree


def page() -> str:
    """Every command with its arguments and options."""
    tree = command_tree()
    out = ["# The command line", escape(tree[""].help or "")]
    out.append(
        "Answers go to stdout, words to people to stderr. With `--json` stdout holds exactly one JSON document. Exit "
        "codes: 0 done, 2 a mistake that is told with its remedy, 130 interrupted (what was done is kept)."
    )
    for name, command in tree.items():
        if name:
            out += [f"## tomoscope {name}", docstring((command.help or "").strip()), _parameters(command)]
    return "\n\n".join(out)


def _parameters(command: Any) -> str:
    rows = ["| | |", "|---|---|"]
    for parameter in command.params:
        words = escape(parameter.help or "").replace("|", "\\|")
        if parameter.param_type_name == "argument":
            name = parameter.name.upper()
            rows.append(f"| `{name if parameter.required else f'[{name}]'}` | {words} |")
            continue
        shown = isinstance(parameter.default, (str, int, float)) and not isinstance(parameter.default, bool)
        default = f" (default: `{parameter.default}`)" if shown and parameter.default != "" else ""
        if parameter.name == "help":
            words = "Show the command's help and leave."
        rows.append(f"| `{', '.join([*parameter.opts, *parameter.secondary_opts])}` | {words}{default} |")
    return "\n".join(rows)
