"""Steps: optimizer and schedule, LightningModule, callbacks, trainer, run record."""
