"""Training: optimizer, LightningModule, callbacks, checkpoints, run record."""
