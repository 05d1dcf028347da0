"""Write report.html for a run that was killed before it could write one, from its config.yaml and metrics.jsonl."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rwkv_peft.config.flags import Parser
from rwkv_peft.console import program_name, say
from rwkv_peft.errors import UserError
from rwkv_peft.run_config import config_from_argv

EPILOG = """The report shows the curves, the settings and the files of the run. Only the run itself can add its sample
texts, versions and hardware. An existing report.html is therefore not replaced."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser(prog=program_name("report"), description=__doc__, epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", help="The run's folder (--proj_dir).")
    parser.add_argument("--debug", action="store_true", help="Show Python tracebacks for user errors too.")
    return parser


def main(argv: Sequence[str]) -> None:
    """Write the report and print its path."""
    folder = Path(build_parser().parse_args(argv).folder)
    page, metrics = folder / "report.html", folder / "metrics.jsonl"
    if page.exists():
        raise UserError(str(page), "already exists", hint="Delete or rename it first.")
    if not metrics.is_file():
        raise UserError(str(metrics), "no such file", expected="the folder of a run")
    config = config_from_argv(["--config", str(folder / "config.yaml")])
    # Imported late: --help does not wait for torch.
    from rwkv_peft.report.report import write_report

    devices = int(config.train.devices) * config.train.num_nodes if config.train.devices.isdigit() else 1
    ending = "written after the run"
    write_report(folder, config, "", "", [], ending, devices=devices, this_process=False)
    say(f"wrote {page}")
