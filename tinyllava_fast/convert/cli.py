"""tlf-convert: read checkpoints of other projects, write their formats, make model folders of a run's checkpoints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tinyllava_fast.commands import Parser
from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import path_argument
from tinyllava_fast.plugins import add_flag, load_plugins

_DTYPES = ("float32", "bfloat16", "float16")
_SOURCES = {
    "llm": "language model that a projector or adapter alone needs",
    "vision": "vision tower that the checkpoint only names",
    "vision2": "the second tower of a mixture of features (its config)",
}


def parser() -> argparse.ArgumentParser:
    """Return the command line of tlf-convert."""
    p = Parser(prog="tlf-convert", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    into = commands.add_parser("import", help="write a model folder of ours from a checkpoint of another project")
    into.add_argument(
        "source",
        type=path_argument,
        help="folder of TinyLLaVA Factory, TinyLLaVABench, LLaVA-1.5, transformers' llava, or an adapter",
    )
    into.add_argument("target", type=path_argument, help="model folder to write; must not exist")
    into.add_argument("--template", metavar="NAME", help="chat template (default: the one that fits the tokenizer)")
    into.add_argument("--base", type=path_argument, metavar="DIR", help="model that an adapter alone was trained on")
    into.add_argument("--dtype", choices=_DTYPES, help="default: as stored")
    group = into.add_mutually_exclusive_group()
    group.add_argument("--merge", action="store_true", help="add a LoRA adapter to the weights, in float32 (default)")
    group.add_argument("--keep-adapter", action="store_true", help="leave a LoRA adapter apart, to be trained further")
    out = commands.add_parser("export", help="write a model in another project's format")
    out.add_argument("source", type=path_argument, help="model folder, or a checkpoint that import takes")
    out.add_argument("target", type=path_argument, help="folder to write; must not exist")
    out.add_argument(
        "--format", required=True, metavar="NAME", help="adapter, factory, gguf, hub, llava, mlx, onnx or openvino"
    )
    out.add_argument("--dtype", choices=_DTYPES, help="default: as stored")
    out.add_argument(
        "--keep-adapter", action="store_true", help="llava: write a LoRA adapter apart, to out/adapter, for peft"
    )
    out.add_argument(
        "--weights", metavar="NAME", help="quantize to. gguf: q8_0, q4_0; onnx: int8; openvino: int8, int4"
    )
    out.add_argument(
        "--keep-first-patch",
        type=path_argument,
        metavar="PICTURES",
        help="gguf: keep the patch that the model was trained without, and say how often answers about these agree",
    )
    out.add_argument("--push", metavar="USER/NAME", help="hub: put the repository on the Hub, created if it is new")
    out.add_argument("--private", action="store_true", help="hub: a repository that --push creates is private")
    for part, what in (("llm", "language model"), ("tokenizer", "tokenizer"), ("vision", "vision tower")):
        out.add_argument(f"--{part}-name", metavar="ID", help=f"factory: hub id of the {what} to state in config.json")
    for command in (into, out):
        add_flag(command)
        for part, what in _SOURCES.items():
            command.add_argument(f"--{part}", type=path_argument, metavar="DIR", help=what)
    merge = commands.add_parser("merge", help="add a model folder's LoRA adapter to its weights")
    merge.add_argument("source", type=path_argument, help="model folder with an adapter, e.g. runs/lora/final")
    merge.add_argument("target", type=path_argument, help="model folder to write; must not exist")
    merge.add_argument("--dtype", choices=_DTYPES, help="default: as stored")
    add_flag(merge)
    whole = commands.add_parser("consolidate", help="write a checkpoint of a run as a model folder")
    whole.add_argument("source", type=path_argument, help="checkpoint, or run folder: its newest intact one")
    whole.add_argument("target", type=path_argument, help="model folder to write; must not exist")
    add_flag(whole)
    out.add_argument("--vision2-name", metavar="ID", help="factory: hub id of the second tower")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run tlf-convert. Returns 0, or 2 after printing what is wrong with the input."""
    args = parser().parse_args(argv)
    setup_logging()
    try:
        load_plugins(args.plugin)
        _run(args)
    except UserError as error:
        log.error("%s", error)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.command == "consolidate":
        from tinyllava_fast.convert.consolidate import consolidate

        consolidate(args.source, args.target)
        return
    import torch

    from tinyllava_fast.convert.convert import export_model, import_checkpoint, merge_adapter
    from tinyllava_fast.models.checkpoints._base import Sources

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.command == "merge":
        merge_adapter(args.source, args.target, dtype=dtype)
        return
    sources = Sources(llm=args.llm, vision=args.vision, vision2=args.vision2)
    if args.command == "import":
        import_checkpoint(
            args.source,
            args.target,
            template=args.template,
            dtype=dtype,
            keep_adapter=args.keep_adapter,
            sources=sources,
            base=args.base,
        )
        return
    given = {part: getattr(args, f"{part}_name") for part in ("llm", "tokenizer", "vision", "vision2")}
    export_model(
        args.source,
        args.target,
        args.format,
        dtype=dtype,
        names={part: name for part, name in given.items() if name},
        sources=sources,
        keep_adapter=args.keep_adapter,
        weights=args.weights,
        keep_first_patch=args.keep_first_patch,
        push=args.push,
        private=args.private,
    )


if __name__ == "__main__":
    sys.exit(main())
