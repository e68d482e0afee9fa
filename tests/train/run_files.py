"""Read the record, checkpoints and TensorBoard events of a run."""

import shutil

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cod_lightning.train.checkpoint import list_checkpoints, read_checkpoint, step_of


def losses(record):
    return record["history"]["train"]["loss"]


def history(record):
    """The history without speeds, which differ between identical runs."""
    return {
        kind: {name: values for name, values in series.items() if name != "tokens_per_second"}
        for kind, series in record["history"].items()
    }


def last(folder):
    """The path of a run's last checkpoint."""
    return list_checkpoints(folder / "checkpoints")[-1]


def newest(folder):
    """The content of a run's last checkpoint."""
    return read_checkpoint(last(folder))


def weights(path):
    """The weights of a checkpoint by parameter name, without the name of the model."""
    return {name.partition(".")[2]: tensor for name, tensor in read_checkpoint(path)["state_dict"].items()}


def copy_checkpoints(source, target, until):
    """Copy the checkpoints of a run up to a step, as if a run in the folder `target` had been interrupted after it."""
    (target / "checkpoints").mkdir(parents=True)
    for path in list_checkpoints(source / "checkpoints"):
        if step_of(path) <= until:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target / "checkpoints" / path.name)


def read_events(folder):
    """The TensorBoard events of a run, with all images."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events
