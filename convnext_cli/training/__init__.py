"""Where it is put together: the LightningModule, the Trainer and its callbacks."""
