"""Formats `--help`: plain text with whole sentences and some colour.

typer's own layout draws boxes with rich, whose import takes longer than the rest of `pqk --help`.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pqk.errors import Interrupted

SETTINGS: dict[str, Any] = {"max_content_width": 110}  # else 80, however wide the terminal is


class Command(TyperCommand):
    """A verb."""

    def get_help(self, ctx: Any) -> str:
        return _coloured(super().get_help(ctx))


class Group(TyperGroup):
    """The verbs under one name. Ctrl-C in one of them is raised as Interrupted: typer would end without a message."""

    def get_help(self, ctx: Any) -> str:
        return _coloured(super().get_help(ctx))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes a line per verb with the whole first sentence of its help; typer cuts it after 45 characters."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                rows.append((name, (command.short_help or command.help or "").strip().partition("\n\n")[0]))
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted from error


def group(help: str) -> typer.Typer:
    """Returns an app of verbs with the help layout of this module; see `finish`."""
    return typer.Typer(
        cls=Group,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings=SETTINGS,
        help=help,
    )


def finish(*apps: typer.Typer) -> None:
    """Gives every verb of these apps the help layout of `Command`."""
    for app in apps:
        for command in app.registered_commands:
            command.cls = Command


def _coloured(text: str) -> str:
    """Returns the text with headings in bold, and verbs, arguments and options in cyan, if the terminal has colours."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    lines, listing = [], False
    for line in text.splitlines():
        heading = re.fullmatch(r"\w+:", line)
        listing = listing or heading is not None
        if heading or line.startswith("Usage:"):
            line = re.sub(r"^\w+:", lambda found: typer.style(found[0], bold=True), line)
        elif listing:  # two spaces, then `name`, `-o, --out` or `--qat / --no-qat`
            line = re.sub(r"^  (\S+(?:[ ,/]+-\S+)*)", lambda found: "  " + typer.style(found[1], fg="cyan"), line)
        lines.append(line)
    return "\n".join(lines)
