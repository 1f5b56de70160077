"""The command line: sub-commands only. Each stage's options are the fields of its configuration."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from rtk import config as configs
from rtk._version import __version__
from rtk.errors import Interrupted, RtkError, did_you_mean
from rtk.identity import from_dict

STAGES: dict[str, type[configs.StageConfig]] = {
    "pretrain": configs.PretrainConfig,
    "draw": configs.DrawConfig,
    "transfer": configs.TransferConfig,
    "evaluate": configs.EvaluateConfig,
}


class Parser(ArgumentParser):
    """Says what is wrong in one line, with the nearest known name, and exits with 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if isinstance(ex, RtkError):
            raise ex
        text = _plain(" ".join(message.split()).rstrip("."))
        unknown = re.search(
            r"(?:invalid choice: '?|[Uu]nrecognized arguments: |[Oo]ption ')([\w.-]+)", text
        )
        command = self.prog.replace(" [options]", "")
        near = self._nearest(unknown[1]) if unknown else ""
        raise RtkError(f"{text}{near}; see {command} --help")

    def _nearest(self, name: str) -> str:
        names = self._known_names()
        inside = [n for n in names if n.startswith("--") and n.endswith(f".{name.lstrip('-')}")]
        return did_you_mean(inside[0] if inside else name, names)

    def _known_names(self) -> list[str]:
        names = [option for action in self._actions for option in action.option_strings]
        names += [option.lstrip("-") for option in names]
        for action in self._actions:
            if isinstance(action.choices, dict):
                names += action.choices
                for sub in action.choices.values():
                    names += sub._known_names()
        return names


_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "tuple": "a list, e.g. [30,60]",
    "NoneType": "null",
}


def _plain(message: str) -> str:
    """Return what jsonargparse says of a value of the wrong type in words; the rest as it is."""
    wrong = re.fullmatch(r'Parser key "([\w.]+)": (.*?)(?:Got|Given) value: ?(.*)', message)
    if wrong:
        key, expected, got = wrong.groups()
        classes = re.findall(r"<class '(\w+)'>", expected.split("Given value type")[0])
        names = dict.fromkeys(_TYPES.get(name, name) for name in classes)
        # YAML reads a bare 2:4 as 124, in base 60.
        quotes = "; text that reads as a number goes in quotes, as '2:4'"
        wanted = " or ".join(names)
        return f"{key}: expected {wanted}, got {got!r}{quotes if wanted == 'text' else ''}"
    group = re.match(r'Parser key "(\w+)": Unable to load config [\'"]?([^\'"]*)', message)
    if group:
        return f"--{group[1]}: {group[2]!r} is no YAML file; single values are --{group[1]}.NAME"
    # A positional of a sub-command is called by both names.
    return re.sub(r"(arguments are required: )\w+\.", r"\1", message)


def _parser() -> Parser:
    parser = Parser(
        prog="rtk",
        description="Draw sparse subnetworks from pretrained vision models and transfer them.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command", required=True)

    demo = Parser(description="Run the whole road on scikit-learn's digits: no network, no GPU.")
    demo.add_argument("--out", default="runs/demo", help="folder for everything the demo makes")
    demo.add_argument("--seeds", type=int, default=3, help="repetitions")
    demo.add_argument("--jobs", type=int, default=2, help="stages at a time")
    commands.add_subcommand("demo", demo, help="everything once, in two minutes")

    doctor = Parser(
        description="Print versions, GPU, what was compiled and which backend ops take; with "
        "--layers, how fast the layers of a ticket are."
    )
    doctor.add_argument(
        "--layers",
        nargs=2,
        metavar=("MODEL", "TICKET"),
        help="time every masked convolution on the GPU beside the dense one: MODEL is a run with a "
        "checkpoint or an architecture, e.g. resnet50, TICKET a run with a ticket (or the files)",
    )
    doctor.add_argument(
        "--image_size",
        type=int,
        help="of --layers: pixels (default: 32 for a 3x3 stem, else 224)",
    )
    doctor.add_argument("--batch_size", type=int, default=128, help="of --layers: images at a time")
    commands.add_subcommand(
        "doctor", doctor, help="what is installed and which backends the ops take"
    )
    for name, stage in STAGES.items():
        text = (stage.__doc__ or "").strip().splitlines()[0]
        sub = Parser(description=text, usage=f"rtk {name} [options]")
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

    path = recipes.run(recipes.demo(arguments.out, arguments.seeds), arguments.jobs)
    print(report.print_table(arguments.out))
    print(f"\nreport: {path}")


def _doctor(arguments: Namespace) -> None:
    if arguments.layers is None:
        from rtk import doctor

        print(doctor.describe())
        return
    from rtk import layers_report

    sizes = {"image_size": arguments.image_size, "batch_size": arguments.batch_size}
    print(layers_report.describe_layers(*arguments.layers, **sizes))


def _report(arguments: Namespace) -> None:
    from rtk import report

    path = report.write_report(
        arguments.folder, arguments.out, note=arguments.note, title=arguments.title
    )
    print(report.print_table(arguments.folder))
    print(f"\nreport: {path}")


def _stage(arguments: Namespace, name: str) -> None:
    from rtk.recipes import run_stage

    values = arguments.as_dict()
    for key in ("config", "debug"):
        values.pop(key, None)
    config = from_dict(STAGES[name], values)
    print(run_stage(config))


_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "demo": _demo,
    "doctor": _doctor,
    "report": _report,
}


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"rtk: warning: {message}", file=sys.stderr)


def _as_parsed(argv: Sequence[str]) -> list[str]:
    """Return the arguments as the parser takes them: 8/255 as a number, --data-root as a field."""
    words: list[str] = []
    for word in argv:
        word = re.sub(r"^--data-root(?==|$)", "--data.root", word)
        option = word if "=" in word else f"{words[-1] if words else ''}={word}"
        fraction = re.search(r"(?:eps|step_size)=([\d.]+)/([\d.]+)$", option)
        if fraction and float(fraction[2]) > 0:
            value = repr(float(fraction[1]) / float(fraction[2]))
            word = word.removesuffix(f"{fraction[1]}/{fraction[2]}") + value
        words.append(word)
    return words


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 for an interrupted run."""
    argv = _as_parsed(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
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
        print(f"rtk: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
