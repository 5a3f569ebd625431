"""Ask early if a hub can be reached: its own client tries for the better part of a minute before it gives up."""

from __future__ import annotations

import re

_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_WAIT_S = 5.0
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")


def is_hub_id(name: str) -> bool:
    """Return True if a hub could know this name: one or two words, none of which begins like a path."""
    return _ID.fullmatch(name) is not None


def no_answer(name: str) -> str | None:
    """Return why no hub can be asked for ``name``, as the end of a sentence; None if it can, or is in the cache."""
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES):
            return None
        if constants.HF_HUB_OFFLINE:
            return "HF_HUB_OFFLINE is set, and the cache does not hold it"
        get_session().head(constants.ENDPOINT, timeout=_WAIT_S)
    except ValueError as error:  # a name that no repository may have
        return " ".join(str(error).split())
    except Exception as error:  # what the client of the installed release raises without a network
        return f"{constants.ENDPOINT} cannot be reached: {error}"
    return None
