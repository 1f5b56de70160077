"""The command line: sub-commands only. Each stage's options are the fields of its configuration."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from rtk import config as configs
from rtk._version import __version__
from rtk.errors import Interrupted, RtkError, did_you_mean

STAGES: dict[str, type[configs.StageConfig]] = {
    "pretrain": configs.PretrainConfig,
    "draw": configs.DrawConfig,
    "transfer": configs.TransferConfig,
    "evaluate": configs.EvaluateConfig,
}


class Parser(ArgumentParser):
    """Says what is wrong in one line, with the nearest known name, and exits with 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if isinstance(ex, RtkError):
            raise ex
        unknown = re.search(
            r"(?:invalid choice: '?|[Uu]nrecognized arguments: |[Kk]ey \"|[Oo]ption ')([\w.-]+)",
            message,
        )
        command = self.prog.replace(" [options]", "")
        near = did_you_mean(unknown[1], self._known_names()) if unknown else ""
        raise RtkError(f"{' '.join(message.split())}{near}; see {command} --help")

    def _known_names(self) -> list[str]:
        names = [option for action in self._actions for option in action.option_strings]
        names += [option.lstrip("-") for option in names]
        for action in self._actions:
            if isinstance(action.choices, dict):
                names += action.choices
        return names


def _parser() -> Parser:
    parser = Parser(
        prog="rtk",
        description="Draw sparse subnetworks from pretrained vision models and transfer them.",
        version=f"rtk {__version__}",
    )
    commands = parser.add_subcommands(dest="command", required=True)

    demo = Parser(description="Run the whole road on scikit-learn's digits: no network, no GPU.")
    demo.add_argument("--out", default="runs/demo", help="folder for everything the demo makes")
    demo.add_argument("--seeds", type=int, default=3, help="repetitions")
    commands.add_subcommand("demo", demo, help="everything once, in two minutes")

    commands.add_subcommand(
        "doctor",
        Parser(description="Print versions, GPU, what was compiled and which backend ops take."),
        help="what is installed and which backends the ops take",
    )
    for name, stage in STAGES.items():
        text = (stage.__doc__ or "").strip().splitlines()[0]
        sub = Parser(description=text)
        sub.add_argument("--config", action="config", help="YAML file with any of these settings")
        sub.add_class_arguments(stage, skip={"resume"})
        sub.add_argument(
            "--resume",
            action=ActionYesNo(no_prefix="no_"),
            default=True,
            help="go on where a stopped run in the same folder was (default); --no_resume restarts",
        )
        commands.add_subcommand(name, sub, help=text)

    report = Parser(description="Write results.csv, plots and report.html from a folder of runs.")
    report.add_argument("folder", help="searched, with all its sub-folders, for result.json")
    report.add_argument("--out", default=None, help="folder to write to (default: the same)")
    report.add_argument("--title", default="", help="of the page")
    report.add_argument("--note", default="", help="a sentence under the title")
    commands.add_subcommand("report", report, help="table, plots and page from finished runs")

    for sub in (parser, *commands.choices.values()):
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _demo(arguments: Namespace) -> None:
    from rtk import recipes, report

    path = recipes.run(recipes.demo(arguments.out, arguments.seeds))
    print(report.print_table(arguments.out))
    print(f"\nreport: {path}")


def _doctor(arguments: Namespace) -> None:
    from rtk import doctor

    print(doctor.describe())


def _report(arguments: Namespace) -> None:
    from rtk import report

    path = report.write_report(
        arguments.folder, arguments.out, note=arguments.note, title=arguments.title
    )
    print(report.print_table(arguments.folder))
    print(f"\nreport: {path}")


def _stage(arguments: Namespace, name: str) -> None:
    from rtk.recipes import STAGES as RUN

    values = arguments.as_dict()
    for key in ("config", "debug"):
        values.pop(key, None)
    config = configs.from_dict(STAGES[name], values)
    print(RUN[type(config)](config))


_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "demo": _demo,
    "doctor": _doctor,
    "report": _report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 for an interrupted run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        arguments: Any = _parser().parse_args(argv)
        name = arguments.command
        values = arguments[name]
        _COMMANDS.get(name, lambda a: _stage(a, name))(values)
    except RtkError as error:
        if debug:
            raise
        print(f"rtk: error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        if debug:
            raise
        print(f"rtk: {error or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
