"""Words of a command line."""

TOY_TRAINING = (
    "data.loader_workers=0",
    "data.batch_size=8",
    "data.micro_batch_size=8",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "trainer.max_steps=6",
    "trainer.log_every=1",
    "trainer.stats_every=3",
    "trainer.measures.jacobian=0",
    "trainer.probe_rows=4",
    "trainer.checkpoint_every=2",
    "trainer.progress=false",
    "eval.every=3",
    "logger=none",
)
"""Overrides for a run of a few seconds, of text or images."""


def last_of_each(words):
    """The words with the last value of each key, as `compose` reads them; a command line refuses two."""
    return list({str(word).partition("=")[0]: str(word) for word in words}.values())
