"""The engines of `tlf-bench race`, one file each: what to install, how to ask."""
