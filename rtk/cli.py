"""The command line: sub-commands only. Each stage's options are the fields of its configuration."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from rtk import config as configs
from rtk import distributed
from rtk._version import __version__
from rtk.errors import Interrupted, RtkError, did_you_mean
from rtk.identity import from_dict, to_dict

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


def _add_resume(parser: Parser) -> None:
    parser.add_argument(
        "--resume",
        action=ActionYesNo(no_prefix="no_"),
        default=True,
        help="go on where a stopped run in the same folder was (default); --no_resume restarts",
    )


def _add_data_actions(parser: Parser) -> None:
    actions = parser.add_subcommands(dest="action", required=True)
    for action, text in (
        ("list", "all named sets: ready or missing, how to get them, size, licence, metric"),
        ("get", "download a named set into the data root"),
        ("check", "read every image of a set: counts, sizes, balance, what is damaged"),
    ):
        sub = Parser(description=f"{text[0].upper()}{text[1:]}.")
        if action != "list":
            sub.add_argument("name", help="of the set; to check, also npz:PATH or folder:PATH")
        if action == "check":
            sub.add_argument("--duplicates", action="store_true", help="find test images in train")
            unused = {"name", "augment", "storage", "skip_bad"}
            sub.add_class_arguments(configs.DataConfig, "data", skip=unused)
        else:
            sub.add_argument("--data.root", help="folder of the named sets")
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
        actions.add_subcommand(action, sub, help=text)


def _parser(defaults: Mapping[str, Any] | None = None) -> Parser:
    """Return the parser; `defaults` are a stage's sections where they are not the usual ones."""
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
        sub.set_defaults((defaults or {}).get(name, {}))
        _add_resume(sub)
        commands.add_subcommand(name, sub, help=text)

    text = (configs.ConvertConfig.__doc__ or "").strip().splitlines()[0]
    convert = Parser(description=text)
    convert.add_argument("file", help="the checkpoint: safetensors, or what torch.save wrote")
    convert.add_class_arguments(
        configs.ConvertConfig,
        skip={"resume", "file", "trust", "seed", "device", "threads"},
    )
    convert.add_argument(
        "--trust",
        action="store_true",
        help="open a pickle that can run code, in a process of its own, as you trust its author",
    )
    _add_resume(convert)
    commands.add_subcommand("convert", convert, help="make a published checkpoint one of rtk's")

    export = Parser(
        description="Write a network as one that runs without rtk, and check that its outputs are "
        "the same: normalisation included, the ticket folded into the weights, any batch size."
    )
    export.add_argument("checkpoint", help="a run's folder or its checkpoint.safetensors")
    export.add_argument("--ticket", help="a run's folder or its ticket.safetensors")
    export.add_argument(
        "--format", default="torch_export", help="torch_export (.pt2), onnx or state_dict"
    )
    export.add_argument("--out", required=True, help="file to write")
    export.add_argument(
        "--image_size",
        type=int,
        help="pixels (default: those of training, else what the stem is for)",
    )
    export.add_argument("--compact", action="store_true", help="remove pruned channels")
    export.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest difference of an output, as a share of the largest output",
    )
    commands.add_subcommand("export", export, help="a network without rtk: torch.export, ONNX")

    advise = Parser(
        description="Advise robust or natural tickets for a target by its Fréchet distance from "
        "the source, after the paper's Table II."
    )
    advise.add_argument("source", help="the set of pretraining, e.g. imagenet")
    advise.add_argument("targets", nargs="+", metavar="target", help="the downstream sets")
    advise.add_class_arguments(configs.AdviseConfig, skip={"resume", "targets"})
    _add_resume(advise)
    commands.add_subcommand("advise", advise, help="robust or natural tickets for a target?")

    images = Parser(description="Say what data sets are there, fetch one or look through one.")
    commands.add_subcommand("data", images, help="what data sets are there; get or check one")
    _add_data_actions(images)  # jsonargparse wants the outer level first

    reproduce = Parser(
        description="Run a figure or table of the paper: its stages, as far as they are not done, "
        "its plot and table with tests, and a gallery over all that are in the folder."
    )
    reproduce.add_argument("names", nargs="*", metavar="NAME", help="fig1 to fig9, tab1, tab2, all")
    reproduce.add_argument("--list", action="store_true", help="say what there is and what is done")
    reproduce.add_argument(
        "--scale",
        default="small",
        help="paper (its protocol), small (32 pixels, one GPU) or smoke (digits on a CPU)",
    )
    reproduce.add_argument("--out", help="folder, shared by figures; default runs/reproduce-SCALE")
    reproduce.add_argument("--jobs", type=int, default=2, help="stages at a time")
    reproduce.add_argument("--data.root", help="folder of the data sets")
    reproduce.add_argument("--source", help="another set to pretrain on, e.g. npz:PATH")
    reproduce.add_argument("--targets", type=list[str], default=[], help="other downstream sets")
    reproduce.add_argument("--segmentation", help="another set with masks")
    reproduce.add_argument("--ood", type=list[str], default=[], help="other sets to tell apart")
    reproduce.add_argument("--weights", help="file with Inception's weights, for FIDs")
    reproduce.add_argument("--features", help="or a run whose own features take their place")
    reproduce.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    reproduce.add_argument(
        "--engine", default="on", help="on, or off: PyTorch alone, to see what the engine saves"
    )
    reproduce.add_argument(
        "--keep", metavar="DIR", help="write DIR/NAME.csv, plots and README.md: what is committed"
    )
    commands.add_subcommand("reproduce", reproduce, help="a figure or table of the paper, by name")

    report = Parser(description="Write results.csv, plots and report.html from a folder of runs.")
    report.add_argument(
        "folder", nargs="?", help="searched, with all its sub-folders, for result.json"
    )
    report.add_argument(
        "--from",
        metavar="DIR",
        help="or a folder that `rtk reproduce --keep` wrote: plots, tables, README.md out of it",
    )
    report.add_argument(
        "--against", metavar="DIR", help="compare these kept figures with another such folder"
    )
    report.add_argument("--out", default=None, help="folder to write to (default: the same)")
    report.add_argument("--title", default="", help="of the page")
    report.add_argument("--note", default="", help="a sentence under the title")
    commands.add_subcommand("report", report, help="table, plots and page from finished runs")

    for sub in (parser, *commands.choices.values()):
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _depending_defaults(argv: Sequence[str]) -> dict[str, Any]:
    """Return the defaults that a stage takes from its other settings, on the line or in a file."""
    depend = {n for n, stage in STAGES.items() if "defaults_for" in vars(stage)}
    if not depend & set(argv):
        return {}
    plain = [word for word in argv if not word.startswith(("--print_config", "--help", "-h"))]
    try:
        arguments: Any = _parser().parse_args(plain)
        name = arguments.command
        sections = STAGES[name].defaults_for(arguments[name].as_dict()) if name in depend else {}
    except RtkError:
        return {}  # which the real parsing finds too
    return {
        name: {
            f"{section}.{field}": value
            for section, config in sections.items()
            for field, value in to_dict(config).items()
        }
    }


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


def _convert(arguments: Namespace) -> None:
    from rtk.recipes import run_stage

    values = arguments.as_dict()
    values.pop("debug")
    print(run_stage(from_dict(configs.ConvertConfig, values)))


def _export(arguments: Namespace) -> None:
    from rtk import export

    values = arguments.as_dict()
    values.pop("debug")
    print(export.export(values.pop("checkpoint"), values.pop("out"), **values))


def _advise(arguments: Namespace) -> None:
    from rtk import advise

    values = arguments.as_dict()
    values.pop("debug")
    values["data"]["name"] = values.pop("source")
    path = advise.run(from_dict(configs.AdviseConfig, values))
    print(f"{advise.describe(path)}\n\nadvice: {path}")


def _data(arguments: Namespace) -> None:
    from rtk.data.check import check, list_sets
    from rtk.data.download import get

    given = arguments[arguments.action].as_dict()
    config = configs.DataConfig(name=given.get("name", ""), **given["data"])
    if arguments.action == "list":
        print(list_sets(config))
    elif arguments.action == "get":
        print(get(config.name, config))
    else:
        found = check(config, duplicates=given["duplicates"])
        print(found.text)
        if found.problems:
            raise RtkError(f"{config.name}: " + "\n".join(found.problems))


def _reproduce(arguments: Namespace) -> None:
    from rtk import recipes

    values = arguments.as_dict()
    values["data_root"] = values.pop("data")["root"]
    names, jobs, listing, kept = (values.pop(n) for n in ("names", "jobs", "list", "keep"))
    values.pop("debug")
    every = recipes.FIGURES.names()
    if listing:
        print(recipes.list_figures(**values))
        return
    if not names:
        raise RtkError(f"reproduce: name a figure or table: {', '.join(every)} or all")
    names = every if "all" in names else names
    chosen = [recipes.reproduce(name, **values) for name in names]  # before anything runs
    for name, recipe in zip(names, chosen, strict=True):
        print(f"\n{name}: {recipes.run(recipe, jobs)}")
        print(recipes.summary(recipe, name))
        if kept is not None:
            print(f"kept: {recipes.keep(recipe, kept)}")
    if kept is not None:
        from rtk import report

        if report.is_kept(kept):  # and not with the engine off only
            print(f"\nreport: {report.rebuild(kept)}")


def _report(arguments: Namespace) -> None:
    from rtk import report

    kept = arguments["from"]
    if (kept is None) == (arguments.folder is None):
        raise RtkError("report: give one of a folder of runs and --from FOLDER, of kept figures")
    if kept is None and arguments.against is not None:
        raise RtkError("report: --against compares kept figures; give --from too")
    if kept is not None:
        print(f"report: {report.rebuild(kept, arguments.out)}")
        if arguments.against is not None:
            print(report.compare_kept(kept, arguments.against))
        return
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
    path = run_stage(config)
    if distributed.speaks():
        print(path)


_COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "demo": _demo,
    "doctor": _doctor,
    "convert": _convert,
    "export": _export,
    "advise": _advise,
    "data": _data,
    "report": _report,
    "reproduce": _reproduce,
}


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if distributed.speaks():
        print(f"rtk: warning: {message}", file=sys.stderr)


def _as_parsed(argv: Sequence[str]) -> list[str]:
    """Return the arguments as the parser takes them: 8/255 a number, --data-root a field."""
    words: list[str] = []
    for word in argv:
        word = re.sub(r"^--data-root(?==|$)", "--data.root", word)
        word = "--data.download=true" if word == "--download" else word
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
            arguments: Any = _parser(_depending_defaults(argv)).parse_args(argv)
            name = arguments.command
            values = arguments[name]
            if name not in STAGES and not distributed.speaks():
                return 0  # under torchrun only stages take more than one process
            _COMMANDS.get(name, lambda a: _stage(a, name))(values)
    except RtkError as error:
        if debug:
            raise
        if distributed.speaks():
            print(f"rtk: error: {error}", file=sys.stderr)
        return distributed.leave(2)
    except (Interrupted, KeyboardInterrupt) as error:
        if debug:
            raise
        if distributed.speaks():
            print(f"rtk: {str(error) or 'interrupted'}", file=sys.stderr)
        return distributed.leave(130)
    except BrokenPipeError:  # e.g. piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
