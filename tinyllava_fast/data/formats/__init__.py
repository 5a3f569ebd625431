"""Forms in which people have records: one file each."""
