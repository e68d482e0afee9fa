"""A `DepthMonitor` callback for `transformers.Trainer` and its subclasses, such as TRL's."""

from __future__ import annotations

from typing import Any

from cod_lightning.nn.pretrained import import_transformers
from cod_lightning.train.monitor import DepthMonitor

transformers = import_transformers("cod_lightning.hf")


class DepthMonitorCallback(transformers.TrainerCallback):
    """A `DepthMonitor` for the Trainer of `transformers`; its numbers go where the trainer's logs go.

        trainer.add_callback(cod.hf.DepthMonitorCallback(trainer, probe=tokens, every=100))

    Args:
        trainer: logs the numbers. None, for `Trainer(callbacks=[...])`: they go to `trainer.state.log_history` and
            trainer_state.json only, because a callback cannot reach the loggers without the trainer.
        **options: of `DepthMonitor`.
    """

    def __init__(self, trainer: Any = None, **options: Any):
        self.trainer, self.monitor = trainer, DepthMonitor(**options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 0:  # a resumed training has measured its step before it saved the checkpoint
            self.log(state, control, others["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.log(state, control, others["model"])

    def log(self, state: Any, control: Any, model: Any) -> None:
        """Measure if it is time, and log the numbers."""
        numbers = self.monitor.step(model, state.global_step)
        if not numbers:
            return
        if self.trainer is None:
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})
            return
        should_log = control.should_log
        # Not the `log` of a derived trainer: those of TRL log the averages of their own metrics, and clear them.
        transformers.Trainer.log(self.trainer, numbers)
        control.should_log = should_log  # `log` clears it, and the loss of this step would not be logged
