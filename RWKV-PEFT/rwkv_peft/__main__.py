"""The program `rwkv-peft`, also started as `python -m rwkv_peft`: runs the subcommand that its first word names."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib import import_module

from rwkv_peft import __version__
from rwkv_peft.errors import UserError, exit_with_message, nearest

COMMANDS = {
    "train": ("train", "Fine-tune a model with Bone or another method, or train one from scratch."),
    "convert": ("convert", "Convert JSON, text or Parquet to token files for training."),
    "inspect": ("inspect_data", "Show what is in a data set: documents, loss mask, batches; check it for damage."),
    "merge": ("merge", "Merge an adapter into its base model: one .pth file for any RWKV-6 program."),
    "report": ("report", "Write report.html for a run that was killed, from its metrics."),
    "chat": ("chat", "Chat with a model in the terminal."),
}
"""Subcommand: its module in rwkv_peft/commands/, and its line in the help."""

HELP = """\
usage: rwkv-peft COMMAND [FLAGS]

Fine-tune RWKV-6 models.

commands:
{commands}

`rwkv-peft COMMAND --help` lists the flags of a command. `rwkv-peft --version` prints the version.
"""


def run(argv: Sequence[str]) -> int | None:
    """Run one subcommand.

    Args:
        argv: the subcommand, then its flags.
    Returns:
        The exit code; None means 0.
    Raises:
        UserError: unknown subcommand (the message suggests the nearest), or a mistake that the subcommand found.
    """
    name, *flags = argv or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(f"rwkv-peft {__version__}")
        return 0
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or "See rwkv-peft --help."
        raise UserError("rwkv-peft", "unknown command", found=repr(name), expected=", ".join(COMMANDS), hint=hint)
    module, _ = COMMANDS[name]
    return import_module(f"rwkv_peft.commands.{module}").main(flags)


def help_text() -> str:
    """Return the help: one line per subcommand."""
    lines = "\n".join(f"{name:<9}{text}" for name, (_, text) in COMMANDS.items())
    return HELP.format(commands=textwrap.indent(lines, "  ")).rstrip()


def main() -> None:
    """Start the program; the entry point of the installed script."""
    exit_with_message(run)


if __name__ == "__main__":
    main()
