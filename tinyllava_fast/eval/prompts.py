"""Sentences that the reference's question files and evaluators append to questions."""

SHORT = "\nAnswer the question using a single word or phrase."
OPTION = "\nAnswer with the option's letter from the given choices directly."
