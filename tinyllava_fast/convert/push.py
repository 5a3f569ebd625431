"""Put a Hub repository that was written into a folder on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> None:
    """Raise UserError for what is no name of a repository."""
    if not _NAME.fullmatch(name):
        raise UserError(f"--push: {name!r} is no name of a repository; give USER/NAME")


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Create the repository if there is none and commit all files. Returns its address.

    The token is huggingface_hub's own: ``hf auth login`` or HF_TOKEN. Raises UserError for what the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Model exported by tinyllava_fast")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(
            f"--push {name}: {' '.join(str(error).split())[:300]}; the repository lies in {folder}: log in (hf auth "
            f"login, or HF_TOKEN) and put it there by `hf upload {name} {folder}`"
        ) from error
    log.info("%s: pushed to %s", folder, made)
    return str(made)
