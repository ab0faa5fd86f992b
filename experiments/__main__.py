"""The experiments of Lappe & Giese 2025, and what goes beyond them, on any models and any images.

jaxvit run --preset embedded --out out/embedded     real weights and photographs, no hub needed
jaxvit run --models facebook/dinov2-with-registers-small facebook/dinov2-small --images FOLDER --out DIR
jaxvit run --preset paper --dry-run                 what the paper's models would take
jaxvit A3 --help                                    one experiment: what it computes, its options
jaxvit sensitivity --preset embedded --out DIR      A3, A5 and A9 under all readings

In a checkout, python -m experiments takes the same arguments; its list names all experiments.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

import jaxvit
from jaxvit import convert
from jaxvit.io import embedded, parallel
from jaxvit.machine import add_machine, on_machine
from jaxvit.processes import add_processes, in_processes

from .core import labelled
from .core.experiment import About, Experiment, Table
from .core.passes import Request
from .models import presets, test_time
from .models.subjects import Spec
from .runner.dry_run import announce
from .runner.folder import alone, present
from .runner.progress import Place
from .runner.registry import EVERY, EXPERIMENTS, PASSES, plugged
from .runner.session import Session

ROWS = 12
"""Of a table that are printed where there are several tables."""
EXPECTED = (convert.ConversionError, jaxvit.CheckpointError, jaxvit.ImageError, embedded.DataError, ValueError)


class Interrupted(BaseException):
    """The process was asked to end."""


def main(arguments: list[str] | None = None) -> int:
    for each in (sys.stdout, sys.stderr):
        if isinstance(each, io.TextIOWrapper):
            each.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--plugin", nargs="+", type=Path, default=[])
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(plugged(early.parse_known_args(arguments)[0].plugin))  # the parser is to know them
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return commanded(arguments)


def commanded(arguments: list[str] | None) -> int:
    """Parses and runs a command."""
    made = parser()
    options = made.parse_args(arguments)
    if options.command == "list":
        for e in EXPERIMENTS.values():
            print(f"{e.id}  {e.title}{f' ({e.figure})' if e.figure else ''}")
        return 0
    options.out = options.out or Path("out") / (options.preset or options.command)
    return in_processes(made, options, lambda: reported(options))


def reported(options: argparse.Namespace) -> int:
    """Runs experiments, and says in one line what went wrong."""
    resumable = f"what was finished is kept in {options.out}: the same command with --resume goes on from there"
    try:
        with on_machine(options), terminable():
            return run(options)
    except (KeyboardInterrupt, Interrupted):
        print(f"\nstopped; {resumable}", file=sys.stderr)
        return 130
    except parallel.ProcessesError:
        raise  # an OSError that only whoever watches the processes can report
    except MemoryError:
        print(f"error: out of memory; take a smaller --batch-size; {resumable}", file=sys.stderr)
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {error.filename or options.out}: {error.strerror or error}; {resumable}", file=sys.stderr)
    except EXPECTED as error:
        after = f"; {resumable}" if isinstance(error.__cause__, OSError) else ""
        print(f"error: {error}{after}", file=sys.stderr)
    return 1


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser("jaxvit", description=__doc__, formatter_class=form)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add = lambda name, help, text: commands.add_parser(name, help=help, description=text, formatter_class=form)  # noqa: E731
    command = add("run", "several experiments, or all", run.__doc__)
    common(command)
    command.add_argument(
        "--only", nargs="+", metavar="ID", choices=list(EXPERIMENTS), help="experiments to run (default: all)"
    )
    of_experiments(command, list(EXPERIMENTS.values()))
    for e in EVERY.values():
        command = add(e.id, e.title, e.help)
        common(command)
        of_experiments(command, [e])
    add("list", "all experiments", "All experiments.")
    return whole


def common(command: argparse.ArgumentParser) -> None:
    """What all commands take that run models."""
    what = command.add_argument_group("models and images")
    what.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="[NAME=]MODEL",
        help="converted models, checkpoint files or folders, or hub ids; after those of the preset",
    )
    what.add_argument("--preset", choices=list(presets.PRESETS), help="a prepared set of models, see the README")
    what.add_argument(
        "--images",
        type=user_path,
        help="a folder of images, searched at any depth (default: 136 crops of sample photographs, which A4 uses too)",
    )
    what.add_argument(
        "--labelled",
        help="labelled images for A4: a folder with one subfolder for each class, or datasets:NAME[:SPLIT]",
    )
    what.add_argument("--limit", type=positive, help="use only this many images, evenly spaced")
    what.add_argument(
        "--size",
        type=size_of,
        default=224,
        help="side of the crops in pixels, or native for each checkpoint's own size (default: %(default)s)",
    )
    what.add_argument(
        "--test-time-registers",
        type=positive,
        metavar="N",
        help="run each model without registers a second time, with N test-time registers",
    )
    how = command.add_argument_group("running")
    add_processes(command)
    add_machine(command)
    how.add_argument("--plugin", nargs="+", metavar="FILE", help="experiments of your own: see docs/experiments.md")
    how.add_argument("--out", type=user_path, help="folder for the results (default: out/ and the preset's name)")
    how.add_argument("--resume", action="store_true", help="continue the run in --out; only what is new is measured")
    how.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    how.add_argument("--dry-run", action="store_true", help="print what would be fetched and how long it will take")
    how.add_argument("--batch-size", type=positive, default=16, help="images at a time (default: %(default)s)")
    how.add_argument("--devices", type=positive, help="how many local devices to spread a batch over (default: all)")
    how.add_argument(
        "--precision",
        choices=("highest", "default"),
        default="highest",
        help="precision of matrix products: highest is float32 on every backend, default is what the backend prefers "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="type of the models"
    )
    how.add_argument(
        "--control-images",
        type=not_negative,
        metavar="N",
        help="images to run under each control and with test-time registers; 0: none (default: 256; 32 of the crops)",
    )
    how.add_argument("--save-every", type=float, default=30.0, help=argparse.SUPPRESS)
    how.add_argument(
        "--show", nargs="+", metavar="PATTERN", help="which images to draw, as patterns of their paths, such as 'cat*'"
    )
    how.add_argument(
        "--examples", type=positive, default=8, metavar="N", help="how many to draw (default: %(default)s)"
    )


def of_experiments(command: argparse.ArgumentParser, experiments: Sequence[Experiment]) -> None:
    """The choices the paper leaves open."""
    group = command.add_argument_group("choices", "Defaults are the readings explained in each experiment's --help.")
    for e in experiments:
        for option in e.options:
            option.add_to(group, e.id)
    read = {name for e in experiments for name in e.passes} | {test_time.NAME}  # of which models are made, too
    for each in PASSES:
        for option in each.options if each.name in read else ():
            option.add_to(group, each.name)


def run(options: argparse.Namespace) -> int:
    """Runs experiments of the paper on one or several models, and writes results.json, figures and a report.

    Models run one after another. Everything measured so far is on disk. After an interruption, or with more models or
    experiments, --resume continues, and gives the same results bit for bit.
    """
    specs, images, root = models_and_images(options)
    experiments = (
        [EXPERIMENTS[name] for name in EXPERIMENTS if name in (options.only or EXPERIMENTS)]
        if (options.command == "run")
        else [EVERY[options.command]]
    )
    request = Request(
        images=images,
        experiments=experiments,
        options=choices(options, experiments),
        labelled=labels(options),
        size=options.size,
        batch_size=options.batch_size,
        control_images=control_images(options),
        save_every=options.save_every,
    )
    if options.dry_run:
        announce(specs, request, options.preset, root)
        return 0
    if options.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    if options.precision == "highest":
        jax.config.update("jax_default_matmul_precision", "highest")
    devices = jax.local_devices()[: options.devices]
    place = Place(options.out, root, shown(images, root, options), options.dtype, devices)
    lead = jax.process_index() == 0
    with alone(options.out) if lead else contextlib.nullcontext():
        if present(options.out) and not (options.resume or options.overwrite):
            raise ValueError(f"{options.out} holds results: --resume goes on with them, --overwrite replaces them")
        session = Session(place, specs, request, command_line())
        parallel.check_disk(options.out)
        if lead and present(options.out) and options.overwrite:
            session.overwrite()
        parallel.wait("the folder is ready")
        results = session.run()
        if lead:
            tell(results, session, experiments)
    return 0 if session.complete else 1


def models_and_images(options: argparse.Namespace) -> tuple[list[Spec], list[Path], Path]:
    """Raises a ValueError if there are none."""
    specs = presets.PRESETS[options.preset]().models if options.preset else []
    specs = [*specs, *map(Spec.parse, options.models)]
    if not specs:
        raise ValueError("no models: give --models MODEL .., or --preset embedded, which needs none")
    if options.test_time_registers:  # each behind the model it is made of; of those with registers none is made
        given, specs = specs, []
        for spec in given:
            more = replace(spec, test_time_registers=options.test_time_registers)
            bare = not spec.random and not spec.test_time_registers
            specs += [spec, more] if bare and more not in given else [spec]
    if options.preset == "paper" and options.images is None:
        if options.dry_run:
            return specs, [], Path()
        raise ValueError("no images: the paper's are those of COCO val2017, give --images FOLDER")
    folder = options.images or embedded.photographs()
    images = jaxvit.find_images(folder)
    if options.limit and options.limit < len(images):
        images = [images[i] for i in np.linspace(0, len(images) - 1, options.limit).round().astype(int)]
    # So that the first ones, which controls are run on, are a sample of all.
    return specs, [images[i] for i in np.random.default_rng(0).permutation(len(images))], folder


def labels(options: argparse.Namespace) -> Any:
    if options.labelled:
        return labelled.parse(options.labelled)
    if options.preset != "paper" and options.images is None:
        return labelled.parse(str(embedded.photographs()))
    return None


def control_images(options: argparse.Namespace) -> int:
    if options.control_images is not None:
        return options.control_images
    return 32 if options.images is None and options.preset != "paper" else 256


def choices(options: argparse.Namespace, experiments: Sequence[Experiment]) -> dict[str, dict[str, Any]]:
    """Id of each experiment, and of each pass, -> name of an option -> value."""
    given = vars(options)
    every = [(e.id, e.options) for e in experiments] + [(p.name, p.options) for p in PASSES]
    return {of: {o.name: given.get(f"{of}.{o.name}", o.default) for o in each} for of, each in every}


def shown(images: Sequence[Path], root: Path, options: argparse.Namespace) -> list[int]:
    """Numbers of the images to show, evenly spaced among those that match."""
    ours = options.images is None
    patterns = options.show or (embedded.EXAMPLES if ours else ["*"])
    names = [path.relative_to(root).as_posix() for path in images]
    matching = [
        i for i, name in enumerate(names) if any(fnmatch(name, p) or fnmatch(Path(name).name, p) for p in patterns)
    ]
    if not matching:
        if options.show:
            raise ValueError(f"no image is named like {' or '.join(patterns)}: --show takes patterns such as 'cat*'")
        matching = list(range(len(images)))
    matching.sort(key=lambda i: names[i])
    every = np.linspace(0, len(matching) - 1, min(options.examples, len(matching))).round().astype(int)
    return [matching[i] for i in every]


def command_line() -> str:
    """As it was typed, without what only says how to start."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word in ("--coordinator", "--processes", "--process-id", "--heartbeat"):
            next(given, None)
        elif word not in ("--resume", "--overwrite", "--distributed"):
            words.append(word)
    return shlex.join(["jaxvit", *words])


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, which schedulers send, ends the run as Ctrl-C does."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise Interrupted

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tell(results: dict[str, Any], session: Session, experiments: Sequence[Experiment]) -> None:
    """The main numbers, for the terminal."""
    names = About.__dataclass_fields__
    models = {key: About(**{n: d[n] for n in names}) for key, d in results["models"].items()}
    for e in experiments:
        numbers = results["experiments"][e.id]["results"]
        table = e.table(numbers, models) if numbers and e.id not in session.broken else None
        print(f"\n{e.id}  {e.title}{f' ({e.figure})' if e.figure else ''}")
        if table is not None:
            print_table(table, ROWS if len(experiments) > 1 else len(table.rows))
        reasons: dict[str, list[str]] = {}
        for key, about in models.items():
            if reason := results["models"][key]["not run"].get(e.id):
                reasons.setdefault(reason, []).append(about.name)
        for reason, those in reasons.items():
            print(f"    not run: {', '.join(those)}: {reason}")
        for who, reason in failures(results, e.id):
            print(f"    failed: {who}: {reason}")
    if results["claims"]:
        print("\nThe paper's statements")
        verdicts = {True: "holds", False: "does not hold", None: "not tested"}
        for claim in results["claims"]:
            print(
                f"    {verdicts[claim['holds']]:14} {claim['experiment']} {claim['text']} [{claim['on']}] {claim['by']}"
            )
    skipped = {
        entry["image"]: entry["error"]
        for model in results["models"].values()
        for each in (model["images"], *model["other passes"].values())
        for entry in each["skipped"]
    }
    if skipped:
        count = "1 image" if len(skipped) == 1 else f"{len(skipped)} images"
        print(f"\n{count} could not be used:", *list(skipped.values())[:5], sep="\n    ")
    for failed in results["failed"].values():
        print(f"\n{failed['name']} could not be run: {failed['reason']}")
    print(f"\nwrote {session.out}: report.html, explorer.html, results.json, figures, per_image")


def failures(results: Mapping[str, Any], id: str) -> list[tuple[str, str]]:
    """Of an experiment: what could not be made, or for which model, and why."""
    found = [("all models", reason) for reason in results["experiments"][id]["failed"]]
    return found + [(m["name"], m["failed"][id]) for m in results["models"].values() if id in m["failed"]]


def print_table(table: Table, most: int) -> None:
    rows = [list(map(str, row)) for row in (table.head, *table.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.head))]
    for row in rows[: 1 + most]:
        first, *rest = row
        print(
            "    "
            + first.ljust(widths[0])
            + "".join(f"  {cell.rjust(w)}" for cell, w in zip(rest, widths[1:], strict=True))
        )
    if len(table.rows) > most:
        print(f"    and {len(table.rows) - most} more, in report.html")
    if table.note:
        print(f"    {table.note}")


def user_path(argument: str) -> Path:
    return Path(argument).expanduser()


def positive(argument: str) -> int:
    return whole_number(argument, 1)


def not_negative(argument: str) -> int:
    return whole_number(argument, 0)


def whole_number(argument: str, least: int) -> int:
    if not argument.removeprefix("-").isdecimal() or int(argument) < least:
        raise argparse.ArgumentTypeError(f"{argument!r} is not a whole number of at least {least}")
    return int(argument)


def size_of(argument: str) -> int | None:
    """None: each checkpoint's own."""
    return None if argument == "native" else positive(argument)


if __name__ == "__main__":
    sys.exit(main())
