"""The paper's experiments as runs: which there are, at which scale, and the results that are kept of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cod_lightning.config import Config, choices, compose, from_plain, with_row
from cod_lightning.errors import UserError, nearest

RECORD = "record.json"
RESULTS = Path("experiments/results")
"""Where results are kept, from the top of a checkout: {scale}/{label of the run}/record.json, and what was measured."""


@dataclass(frozen=True)
class Row:
    """A row of an experiment at one scale."""

    experiment: str
    name: str
    words: tuple[str, ...]
    """What the command line says to get it, but for the seed."""
    config: Config

    @property
    def claim(self) -> dict[str, Any]:
        """What the experiment's file says of it: `label`, `published`, `note`."""
        return self.config.paper["rows"][self.name]

    def run(self, seed: int) -> Config:
        """The configuration of one of its runs, kept under its label whatever experiment asked for it first."""
        config = replace(self.config, seed=seed)
        return replace(config, name=f"{config.scale}/{config.label}")


def named(names: Sequence[str]) -> list[str]:
    """Experiments by name, or all whose name begins with `name_`; `table1` is all of Table 1.

    Raises:
        UserError: there is none of that name.
    """
    known = choices("experiments")
    found: list[str] = []
    for name in names:
        matching = [other for other in known if other == name or other.startswith(f"{name}_")]
        if not matching:
            starts = {other.rpartition("_")[0] for other in known if "_" in other}
            raise UserError(f"{name!r} is no experiment: {nearest(name, [*known, *starts])}")
        found += [other for other in matching if other not in found]
    return found


def rows(experiments: Iterable[str], scale: str, overrides: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of some experiments.

    Raises:
        UserError: as `compose`; an experiment without rows.
    """
    for name in experiments:
        words = (f"experiments={name}", f"scale={scale}", *overrides)
        base = compose(words)
        if not base.paper.get("rows"):
            raise UserError(f"{name} has no rows to reproduce: train it with fit experiments={name}")
        for row in base.paper["rows"]:
            yield Row(name, row, (*words, f"row={row}"), with_row(base, row, overrides))


def kept(results: Path) -> dict[str, Path]:
    """The folders of all results below a folder, by the id of the run.

    Raises:
        UserError: a record cannot be read.
    """
    return {from_plain(config_of(path), path).id: path.parent for path in sorted(results.glob(f"*/*/{RECORD}"))}


def config_of(record: Path) -> dict[str, Any]:
    try:
        return json.loads(record.read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{record}: not a run record ({type(error).__name__}: {error}); remove it") from error


def keep(run: Path, results: Path, measures: Iterable[str] = ()) -> Path:
    """Copy a run's record, in one line, and what was measured of it into the results; returns the folder there."""
    target = results / run.parent.name / run.name
    target.mkdir(parents=True, exist_ok=True)
    partial = target / f".{RECORD}.partial"
    partial.write_text(json.dumps(json.loads((run / RECORD).read_text()), separators=(",", ":")) + "\n")
    partial.replace(target / RECORD)
    for name in measures:
        shutil.copyfile(run / "measure" / f"{name}.json", target / f"{name}.json")
    return target
