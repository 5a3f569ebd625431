"""The optimizers behind ``optim.type``: each is one file of this folder, or a plugin."""
