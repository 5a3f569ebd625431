"""Names of a user's that become files or folders."""

from __future__ import annotations

from tinyllava_fast.fields import is_text

_MOST_BYTES = 200  # of 255 that file systems take; the rest is for what is put around a name, e.g. .tmp-0123abcd-NAME


def file_name_fault(name: str) -> str:
    """Return the fault of a name as that of one file or folder, on any system and beside our own; "" if it has none."""
    if not name.strip():
        return "it is empty"
    if not is_text(name) or not name.isprintable():
        return "it holds a control character, or another that cannot be printed"
    if "/" in name or "\\" in name:
        return "it holds a slash"
    if name != name.strip() or name.startswith(".") or name.endswith("."):
        return "it begins or ends with a dot or a space"
    if len(name.encode()) > _MOST_BYTES:
        return f"it is {len(name.encode())} bytes long, the most is {_MOST_BYTES}"
    return ""
