"""tlf-serve: answer questions about images over HTTP, as OpenAI's clients ask them.

It listens on this machine alone, unless --host says otherwise; then it wants a key.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinyllava_fast.commands import Parser
from tinyllava_fast.errors import UserError, nearest
from tinyllava_fast.hardware import LOADING_BLOCK, bound_memory, release_memory
from tinyllava_fast.infer.flags import add_model_flags, positive, threads
from tinyllava_fast.log import log, setup_logging
from tinyllava_fast.paths import expand_home, path_argument
from tinyllava_fast.plugins import load_plugins

if TYPE_CHECKING:
    from tinyllava_fast.serve.limits import ServerLimits
    from tinyllava_fast.serve.served import Served

KEY_VARIABLE = "TLF_API_KEY"
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
EXAMPLES = """
  tlf-serve runs/demo/final
  tlf-serve --models small=runs/a/final large=runs/b/final --port 9000
  tlf-serve runs/base/final --adapter maps=runs/maps/final --adapter birds=runs/birds/final
  TLF_API_KEY=... tlf-serve runs/demo/final --host 0.0.0.0 --host-name gpu1.example.org
"""


def parser() -> argparse.ArgumentParser:
    """The command line of tlf-serve."""
    p = Parser(
        prog="tlf-serve",
        description=__doc__,
        epilog=f"examples:{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", nargs="?", type=path_argument, help="model folder, e.g. runs/demo/final")
    p.add_argument("--models", nargs="+", default=[], metavar="[NAME=]FOLDER", help="several models, asked for by name")
    p.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME[@MODEL]=FOLDER",
        help="LoRA adapter that requests ask for by name, beside its model; may be given several times",
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    p.add_argument("--api-key", metavar="KEY", help=f"what clients have to send (default: the variable {KEY_VARIABLE})")
    p.add_argument("--no-auth", action="store_true", help="listen elsewhere than on this machine without a key")
    p.add_argument(
        "--host-name", action="append", default=[], metavar="NAME", help="a name that browsers know this server by"
    )
    p.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help="fetch images from there (default: none)",
    )
    p.add_argument("--media-path", type=path_argument, metavar="DIR", help="file:// URLs may name images below it")
    p.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: all cores)")
    p.add_argument("--batch-tokens", type=positive, metavar="N", help="rows of the K/V pool (default: 16384)")
    p.add_argument("--max-waiting", type=positive, default=256, metavar="N", help="requests that wait (default: 256)")
    p.add_argument("--look", action="store_true", help="let clients look inside answers; keeps plain weights, too")
    _add_limits(p)
    add_model_flags(p)
    return p


def _add_limits(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("limits, of one request where they do not say otherwise")
    for flag, default, text in (
        ("--max-body-mb", 64, "its body"),
        ("--max-image-mb", 20, "the file of an image"),
        ("--max-megapixels", 67, "an image"),
        ("--max-images", 16, "images"),
        ("--max-new-tokens", 2048, "new tokens, and how many where none are named"),
        ("--max-choices", 16, "choices (n)"),
        ("--max-memory-mb", 2048, "bodies and decoded pictures of all requests together"),
        ("--max-look-mb", 8192, "memory of a look inside (--look)"),
        ("--max-connections", 1024, "connections of all clients; of more the oldest idle one is closed"),
        ("--client-seconds", 30, "time for sending a request's head, its body, and for taking what is sent back"),
        ("--drain-seconds", 60, "time to finish what runs after SIGTERM"),
    ):
        group.add_argument(flag, type=positive, default=default, metavar="N", help=f"{text} (default: {default})")


def main(argv: Sequence[str] | None = None) -> int:
    """Run tlf-serve until SIGTERM or Ctrl-C.

    Returns 0; 2 after saying what is wrong with the input; 130 for Ctrl-C before it has started.
    """
    args = parser().parse_args(argv)
    setup_logging()
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    try:
        load_plugins(args.plugin)
        return _run(args)
    except (UserError, ValueError) as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(args: argparse.Namespace) -> int:
    key, folders = _key(args), _folders(args)
    adapters = _adapters(args.adapter, folders)
    from tinyllava_fast.serve.app import build_app
    from tinyllava_fast.serve.fetch import Fetcher
    from tinyllava_fast.serve.media import Media
    from tinyllava_fast.serve.server import Server, bound, listen

    limits = _limits(args)
    hosts, allowed = _host_names(args), frozenset(host.lower() for host in args.allow_host)
    fetch = Fetcher(allowed, limits.image_bytes, limits.fetch_seconds) if allowed else None
    folder = Path(args.media_path) if args.media_path else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"--media-path {folder}: no such folder")
    models: dict[str, Served] = {}
    with bound(args.host, args.port) as socket:
        bound_memory(LOADING_BLOCK)  # no holes of weights stay that were read, converted and freed
        try:
            for name, path in folders.items():
                models[name] = _open(name, path, args)
            for name, (model, path) in adapters.items():
                models[name] = models[model].adapted(name, path)
            guard = build_app(
                models,
                limits=limits,
                media=Media(limits, folder, fetch),
                key=key,
                hosts=hosts,
            )
            bound_memory()
            release_memory()
            listen(socket)
            shown = f"[{args.host}]" if ":" in args.host else args.host
            log.info("%s at http://%s:%d", ", ".join(models), shown, socket.getsockname()[1])
            Server(guard, limits).run([socket])
        finally:
            for served in models.values():
                if served.base is None:
                    served.live.close()
    return 0


def _key(args: argparse.Namespace) -> str | None:
    """The key that clients need; None: none. UserError where there must be one."""
    key = os.environ.get(KEY_VARIABLE) if args.api_key is None else args.api_key
    if key is not None and (not key.strip() or key != key.strip() or not key.isascii() or not key.isprintable()):
        raise UserError("--api-key: the key must be printable ASCII without spaces around it")
    if key is None and args.host not in LOOPBACK and not args.no_auth:
        raise UserError(
            f"--host {args.host}: others can reach this; give --api-key (or the variable {KEY_VARIABLE}), or "
            "say --no-auth"
        )
    return key


def _folders(args: argparse.Namespace) -> dict[str, str]:
    """Folder by name of each model. UserError for none, and for two of one name."""
    found: dict[str, str] = {}
    for text in [*([args.model] if args.model else []), *args.models]:
        name, separator, path = text.partition("=")
        if not separator or "/" in name:
            path = path_argument(text)
            parts = Path(os.path.abspath(path)).parts
            name = parts[-2] if parts[-1] == "final" and len(parts) > 2 else parts[-1]
        if not name:
            raise UserError(f"{text}: a model without a name; write NAME=FOLDER, or the folder alone")
        if name in found:
            raise UserError(f"two models are called {name!r}; give one another name: NAME=FOLDER")
        found[name] = path
    if not found:
        raise UserError("no model; name its folder, e.g. tlf-serve runs/demo/final")
    return found


def _adapters(given: Sequence[str], models: Collection[str]) -> dict[str, tuple[str, str]]:
    """Model and folder by name of each adapter. UserError for a name that is taken, and for a model there is not."""
    found: dict[str, tuple[str, str]] = {}
    for text in given:
        left, separator, path = text.partition("=")
        name, _, model = left.partition("@")
        if not separator or not name or "/" in name:
            raise UserError(f"--adapter {text}: give NAME=FOLDER, or NAME@MODEL=FOLDER where there are several models")
        if name in models or name in found:
            raise UserError(f"--adapter {text}: {name!r} is taken; give another name")
        if not model and len(models) > 1:
            raise UserError(f"--adapter {text}: say of which model it is: {name}@MODEL; {nearest('', models)}")
        model = model or next(iter(models))
        if model not in models:
            raise UserError(f"--adapter {text}: there is no model {model!r}; {nearest(model, models)}")
        found[name] = model, expand_home(path)
    return found


def _host_names(args: argparse.Namespace) -> list[str]:
    """The names that browsers know the server by. UserError for one with a scheme, a port or a path."""
    for name in args.host_name:
        if not _HOST_NAME.fullmatch(name):
            raise UserError(f"--host-name {name}: expected a name alone, without http:// and port: gpu1.example.org")
    return list(args.host_name)


def _limits(args: argparse.Namespace) -> ServerLimits:
    from tinyllava_fast.serve.limits import MB, ServerLimits

    return ServerLimits(
        body_bytes=args.max_body_mb * MB,
        image_bytes=args.max_image_mb * MB,
        pixels=args.max_megapixels * 10**6,
        images=args.max_images,
        new_tokens=args.max_new_tokens,
        choices=args.max_choices,
        memory_bytes=args.max_memory_mb * MB,
        look_bytes=args.max_look_mb * MB,
        connections=args.max_connections,
        client_seconds=args.client_seconds,
        drain_seconds=args.drain_seconds,
    )


def _open(name: str, path: str, args: argparse.Namespace) -> Served:
    from tinyllava_fast.infer.live import LiveEngine
    from tinyllava_fast.look.assistant import Assistant
    from tinyllava_fast.serve.served import Served

    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    assistant = Assistant.from_pretrained(
        path,
        dtype=args.dtype,
        device=args.device,
        weights=args.weights,
        batch_tokens=args.batch_tokens,
        speculate=args.speculate,
    )
    assistant.engine.tokenizer.name_or_path = name  # clients are told of it, and not of a folder
    live = LiveEngine(assistant.engine, max_waiting=args.max_waiting)
    looker = assistant.separate_looker() if args.look else None
    served = Served(name, assistant.engine, live, int(time.time()), looker=looker)
    served.warm_up()
    return served


if __name__ == "__main__":
    sys.exit(main())
