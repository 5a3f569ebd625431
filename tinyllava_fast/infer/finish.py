"""Why an answer ended, besides "eos", "stop" and "length": see Answer.finish. Apart, for readers without torch."""

from __future__ import annotations

CONTEXT = "context"
"""The model's context was full before ``max_new_tokens``."""
TOO_LONG = "too long"
"""The prompt alone is longer than the model's context."""
UNREADABLE = "unreadable image"
"""One of the request's images cannot be read."""
REFUSED = "refused"
"""Something else is wrong with the request."""
