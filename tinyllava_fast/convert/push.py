"""Put a Hub repository that was written into a folder on the Hub."""

from __future__ import annotations

from pathlib import Path

from tinyllava_fast.errors import UserError
from tinyllava_fast.log import log


def check_name(name: str) -> None:
    """Raise UserError for what the Hub takes for no name of a repository, or for one without an owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        why = "" if name.count("/") == 1 and name.isascii() else "expected one / and no letters beyond a to z"
    except HFValidationError as error:
        why = str(error)
    if why:
        raise UserError(f"--push: {name!r} is no name of a repository; give USER/NAME ({why})")


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Create the repository if there is none and commit all files. Returns its address.

    The token is huggingface_hub's own: ``hf auth login`` or HF_TOKEN. Raises UserError for what the Hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="Model exported by tinyllava_fast")
    except Exception as error:  # those of the HTTP library that huggingface_hub uses have no common base
        raise UserError(
            f"--push {name}: {' '.join(str(error).split())[:300]}; the repository lies in {folder}: see that the Hub "
            f"can be reached, log in (hf auth login, or HF_TOKEN) and put it there by `hf upload {name} {folder}`"
        ) from error
    log.info("%s: pushed to %s", folder, made)
    return str(made)
