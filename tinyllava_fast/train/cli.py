"""tlf-train CONFIG [--resume auto|never|PATH] [--profile] [--dry-run] [key.path=value ...]; tlf-train status RUN"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tinyllava_fast.commands import COMPLETION, Parser, leave, more_help, nearest_flag, version
from tinyllava_fast.errors import LostError, SaidError, ShortageError, UserError
from tinyllava_fast.hardware import prepare_memory
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import expand_home, path_argument
from tinyllava_fast.train.attempts import note_refusal

USAGE = """\
usage: tlf-train CONFIG [--resume auto|never|PATH] [--nproc N [--max-restarts N]] [--profile] [key.path=value ...]
                 [--dry-run] [--print-config] [--help]
       tlf-train status RUN [--json]

Train the stages of a YAML run configuration. A key is overridden by its dotted path, a stage is addressed by its name;
of a key that is given twice the last value holds:
  tlf-train configs/demo.yaml seed=1 stages.finetune.optim.lr=3e-4
  tlf-train configs/demo.yaml --nproc 2 engine.type=ddp
  torchrun --nnodes 2 --nproc_per_node 8 ... -m tinyllava_fast.train.cli configs/demo.yaml engine.type=fsdp
  srun tlf-train configs/demo.yaml engine.type=fsdp

  --resume auto    continue where the run in output_dir stopped, if it did (default)
  --resume never   start over; checkpoints of an earlier run in output_dir are removed
  --resume PATH    continue from that checkpoint or run folder
  --nproc N        start N processes on this machine, as torchrun does; engine.type is ddp, fsdp or deepspeed
  --max-restarts N with --nproc: if a process dies or a disk is full, start all again from the last checkpoint, N times
                   at most; not after a refusal (exit code 2), which would only repeat
  --profile        record two steps of each stage: profile-STAGE.md, .json and .trace.json in output_dir
  --dry-run        look at everything (files, tokens, memory, schedule) and exit: nothing is trained or written
  --print-config   print the resolved configuration and exit: nothing is trained (--print_config is the same)
  --help           this, and every key of a configuration with its default, range and meaning
  --version        print the version and exit
  --print-completion SHELL
                   print what completes this command's arguments in bash, zsh or tcsh, and exit
  status RUN       say where the run of an output_dir, or of a configuration, stands: alive, stalled, dead and why, its
                   step, losses and best model; exit code 1: it needs somebody (a file called status: ./status)
"""
FLAGS = ("--dry_run", "--help", "--print_config", "--profile", "--version")
RESUME = ("auto", "never")
_ALIASES = {"-h": "--help", "--dry-run": "--dry_run", "--print-config": "--print_config"}


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say and return the exit code.

    0, also after SIGUSR1; 2 for what is wrong until somebody mends it; 1 for what may be over at the next try: another
    process of the run that died, a full disk, memory; 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    setup_logging()
    prepare_memory()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except (ShortageError, LostError) as error:
        log.error("%s", error)
        return 1
    except UserError as error:
        log.error("%s", error)
        note_refusal()
        return 2
    except SaidError as error:
        if error.exit_code == 2:
            note_refusal()
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130


def command() -> NoReturn:
    """Entry point of tlf-train."""
    leave(main)


def _run(argv: list[str]) -> int:
    if argv[:1] == ["status"]:
        return _status(argv[1:])
    if argv[:1] == [COMPLETION]:
        _completed().parse_args(argv)  # which exits
    processes, restarts, argv = split_processes(argv)
    path, resume, overrides, flags = parse(argv)
    if "--version" in flags:
        sys.stdout.write(f"{version()}\n")
        return 0
    if "--help" in flags:
        from tinyllava_fast.config.load import describe

        sys.stdout.write(f"{USAGE}\n{more_help()}\nConfiguration keys:\n{describe(names=_registered())}\n")
        return 0
    if not argv:
        sys.stdout.write(f"{USAGE}\ntlf-train --help lists every key of a configuration\n")
        return 2
    if path is None:
        raise UserError("no configuration file given; tlf-train CONFIG, e.g. tlf-train configs/demo.yaml")
    from tinyllava_fast.config.load import dump, load_run

    config = load_run(path, overrides)
    if "--print_config" in flags:
        sys.stdout.write(dump(config))
        return 0
    if processes:
        from tinyllava_fast.train.engine.launch import check_processes, start_processes

        check_processes(config.engine, processes)
        return start_processes(processes, restarts, argv)
    from tinyllava_fast.train.loop import start, train
    from tinyllava_fast.train.stops import StopRequest

    if "--dry_run" in flags:
        from tinyllava_fast import group
        from tinyllava_fast.train.dry_run import dry_run

        process = start(config, path)
        with group.in_concert():
            text = dry_run(config, process, resume)
        if process.rank == 0:
            sys.stdout.write(f"{text}\n")
        return 0
    try:
        train(config, resume=resume, profile="--profile" in flags, file=path)
    except StopRequest as stop:
        log.warning("%s", stop.said)
        return stop.exit_code
    return 0


def _completed() -> Parser:
    """Return the flags as a parser has them: only shells' completion asks for it."""
    p = Parser(prog="tlf-train")
    p.add_argument("config", type=path_argument)
    p.add_argument("--resume", type=path_argument)
    for flag in ("--nproc", "--max-restarts"):
        p.add_argument(flag, type=int)
    for flag in (*FLAGS, *_ALIASES):
        if flag not in ("--version", "--help", "-h"):
            p.add_argument(flag, action="store_true")
    return p


def _status(argv: list[str]) -> int:
    """Say where a run stands. Return 0 if it prepares, runs or has finished, else 1."""
    from tinyllava_fast.train.status import read_status

    if {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        return 0
    runs = [argument for argument in argv if not argument.startswith("-")]
    if unknown := [argument for argument in argv if argument.startswith("-") and argument != "--json"]:
        raise UserError(f"{unknown[0]}: unknown flag; {nearest_flag(unknown[0], ['--json']) or 'known: --json'}")
    if len(runs) != 1:
        raise UserError(f"tlf-train status takes one run folder, got {len(runs)}: tlf-train status RUN [--json]")
    run = expand_home(runs[0])
    if Path(run).is_file():
        from tinyllava_fast.config.load import load_run

        run = load_run(run).output_dir
    status = read_status(run)
    sys.stdout.write((status.as_json() if "--json" in argv else str(status)) + "\n")
    return 0 if status.well else 1


def _registered() -> dict[str, list[str]]:
    """Return the names of all components of a run by the kind of their registry."""
    from tinyllava_fast.data.templates.base import TEMPLATES
    from tinyllava_fast.eval.benchmarks.base import BENCHMARKS
    from tinyllava_fast.models.connectors.base import CONNECTORS
    from tinyllava_fast.models.llm.base import LLMS
    from tinyllava_fast.models.vision.base import VISION
    from tinyllava_fast.recipes.base import RECIPES
    from tinyllava_fast.registry import Registry
    from tinyllava_fast.train.loggers.base import LOGGERS
    from tinyllava_fast.train.optimizers.base import OPTIMIZERS

    registries: list[Registry[Any]] = [LLMS, VISION, CONNECTORS, TEMPLATES, RECIPES, OPTIMIZERS, LOGGERS, BENCHMARKS]
    return {registry.kind: registry.names() for registry in registries}


def split_processes(argv: Sequence[str]) -> tuple[int, int, list[str]]:
    """(--nproc, --max-restarts, the other arguments). UserError for what is no number, or restarts of nothing."""
    numbers, rest = {"--nproc": 0, "--max-restarts": 0}, []
    left = list(argv)
    while left:
        argument = left.pop(0)
        name, given, value = argument.partition("=")
        if name not in numbers:
            rest.append(argument)
            continue
        if not given:
            value = left.pop(0) if left else ""
        least = 1 if name == "--nproc" else 0
        if not (value.isascii() and value.isdigit()) or int(value) < least:
            raise UserError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        numbers[name] = int(value)
    if numbers["--max-restarts"] and not numbers["--nproc"]:
        raise UserError("--max-restarts: needs --nproc N, the number of processes to start, which may be 1")
    return numbers["--nproc"], numbers["--max-restarts"], rest


def parse(argv: Sequence[str]) -> tuple[str | None, str, list[str], set[str]]:
    """(config path, resume, overrides as key=value, flags). Raises UserError for an argument it can't place."""
    path, resume, overrides, flags = None, "auto", [], set()
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        argument = _ALIASES.get(argument, argument)
        if argument in FLAGS:
            flags.add(argument)
        elif argument == "--resume" or argument.startswith("--resume="):
            _, given, value = argument.partition("=")
            if not given:
                value = rest.pop(0) if rest else ""
            if not value or value.startswith("--"):
                raise UserError("--resume: expected auto, never or a path")
            resume = value if value in RESUME else expand_home(value)
        elif argument.startswith("--"):
            overrides.append(_override(argument, rest))
        elif "=" in argument:
            overrides.append(argument)
        elif argument.startswith("-") and not Path(argument).exists():
            raise UserError(_unknown(argument))
        elif path is None:
            path = argument
        else:
            raise UserError(f"unexpected argument {argument!r}; overrides are key.path=value")
    return path, resume, overrides, flags


def _override(argument: str, rest: list[str]) -> str:
    """key=value of ``--key=value``, or of ``--key`` and the argument behind it, which is taken from ``rest``."""
    from tinyllava_fast.config.schema import RunConfig

    key, given, value = argument[2:].partition("=")
    keys = [field.name for field in dataclasses.fields(RunConfig)]
    if "." not in key and key not in keys:
        raise UserError(_unknown(argument, keys))
    if not given:
        if not rest or rest[0].startswith("--"):
            raise UserError(f"{argument}: expected a value: {argument} VALUE or {key}=VALUE")
        value = rest.pop(0)
    return f"{key}={value}"


def _unknown(argument: str, keys: Sequence[str] = ()) -> str:
    flags = ("--dry-run", "--help", "--print-config", "--profile", "--resume", "--version")
    hint = (
        nearest_flag(argument, [*flags, "--nproc", "--max-restarts", *(f"--{key}" for key in keys)])
        or f"known: {', '.join(flags)}"
    )
    return f"{argument}: unknown flag; {hint}; a key of the configuration is set by key.path=value"


if __name__ == "__main__":
    command()
