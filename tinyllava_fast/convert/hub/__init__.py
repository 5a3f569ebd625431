"""The code of a Hub repository (``--format hub``): it needs transformers and torch alone."""
