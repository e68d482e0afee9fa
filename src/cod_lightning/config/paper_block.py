"""The `paper:` block of an experiment's file: its fields, and their check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import accumulate
from operator import attrgetter
from typing import Any

from cod_lightning.config.groups import choices
from cod_lightning.config.schema import METRIC_FORMATS, Config, flatten
from cod_lightning.errors import nearest, short_repr
from cod_lightning.evaluate import PAPER_TASKS
from cod_lightning.measure.registry import MEASURES
from cod_lightning.settings import choice_errors

Check = Callable[[str, Any], list[str]]
"""A function of a field's name and value that returns the errors of the value."""

AXES: dict[str, Callable[[Config], float]] = {
    "tokens": attrgetter("training_tokens"),
    "blocks": attrgetter("model.num_hidden_layers"),
    "lr": attrgetter("optim.lr"),
    "embedding_std": attrgetter("model.embedding_std"),
}
"""The settings that a family of experiments may vary (`axis`), by name."""
FIELDS = flatten(asdict(Config()))
SETTINGS = {"norm", *(part for name in FIELDS for part in accumulate(name.split("."), "{}.{}".format))}
"""The sections and fields of a configuration, whose sources `settings` gives."""


# Checks of a value ---------------------------------------------------------------------------------------------------


def must(words: str, holds: Callable[[Any], bool]) -> Check:
    """Check a value by a function; the words complete an error, such as "must be text"."""
    return lambda name, value: [] if holds(value) else [f"{name}={short_repr(value)} {words}"]


def one_of(known: Callable[[], Iterable[str]]) -> Check:
    """Check that a value is one of the names that a function returns."""
    return lambda name, value: choice_errors(name, value, tuple(known()))


def optional(check: Check) -> Check:
    """Accept null too."""
    return lambda name, value: [] if value is None else check(name, value)


def list_of(check: Check, example: str) -> Check:
    """Check a list and each of its entries."""

    def check_list(name: str, value: Any) -> list[str]:
        if not isinstance(value, list):
            return [f"{name}={short_repr(value)} must be a list, as in {example}"]
        return [error for index, entry in enumerate(value) for error in check(f"{name}[{index}]", entry)]

    return check_list


def mapping_of(check: Check, words: str) -> Check:
    """Check a mapping with keys of the user, and each of its values."""

    def check_mapping(name: str, value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            return [f"{name}={short_repr(value)} {words.format(name)}"]
        if unquoted := [key for key in value if not isinstance(key, str)]:
            return [f"{name}: the name {key!r} must be text: write '{key}' in quotes" for key in unquoted]
        return [error for key, entry in value.items() for error in check(f"{name}.{key}", entry)]

    return check_mapping


def block_of(checks: Mapping[str, Check]) -> Check:
    """Check a mapping with these fields, all of which may be missing."""

    def check_block(name: str, value: Any) -> list[str]:
        if not isinstance(value, Mapping):
            return [f"{name}={short_repr(value)} must be a mapping of {', '.join(sorted(checks))}"]
        unknown = [f"{name}.{key} is not a field: {nearest(str(key), checks)}" for key in value if key not in checks]
        known = {key: entry for key, entry in value.items() if key in checks}
        return unknown + [error for key, entry in known.items() for error in checks[key](f"{name}.{key}", entry)]

    return check_block


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < 2**63 and math.isfinite(value)


def is_published(value: Any) -> bool:
    return all(map(is_number, value.values())) if isinstance(value, Mapping) else value is None or is_number(value)


def is_curve(value: Any) -> bool:
    """Whether a value is a list of (step, value)."""
    points = value if isinstance(value, list) else []
    return bool(points) and all(isinstance(p, list) and len(p) == 2 and all(map(is_number, p)) for p in points)


def settings_errors(name: str, value: Any) -> list[str]:
    """Errors of `settings`: the source of each setting, by its field or section."""
    errors = mapping_of(TEXT, "must be a mapping of sources, as in {{optim.lr: inferred}}")(name, value)
    for key in value if not errors else ():
        section = key.partition(".")[0]
        if key not in SETTINGS and section != "norm":
            near = [known for known in SETTINGS if known.partition(".")[0] == section]
            errors.append(f"{name}.{key} is not a field: {nearest(key, near or [s for s in SETTINGS if '.' not in s])}")
    return errors


# The fields ----------------------------------------------------------------------------------------------------------

TEXT = must("must be text: write a number in quotes", is_text)
COUNT = must("must be a whole number of at least 1", lambda value: type(value) is int and 1 <= value < 2**63)
OVERRIDES = must(
    "must be a mapping of overrides, as in {optim.lr: 0.001}", lambda value: value is None or isinstance(value, Mapping)
)


def set_errors(name: str, value: Any) -> list[str]:
    """Errors of the overrides of a row."""
    if errors := OVERRIDES(name, value):
        return errors
    own = [key for key in value or () if str(key).partition(".")[0] in ("paper", "scales")]
    return [f"{name}.{key}: a row does not change its experiment's file: remove it" for key in own]


ROW = {
    "label": TEXT,
    "set": set_errors,
    "published": must("must be a number >= 0 without quotes, or one for each metric: {ppl: 18.2}", is_published),
    "evaluation_batches": optional(COUNT),
    "note": optional(TEXT),
    "subject": TEXT,
}
"""The fields of a row."""
PAPER = {
    "target": TEXT,
    "column": must("must be text or a number", lambda value: isinstance(value, str) or is_number(value)),
    "source": TEXT,
    "metric": optional(TEXT),
    "axis": optional(one_of(lambda: AXES)),
    "start": optional(one_of(lambda: choices("experiments"))),
    "tasks": TEXT,
    "tokens": optional(must("must be a number >= 0, such as 2.2e9", is_number)),
    "evaluation_batches": optional(COUNT),
    "rows": mapping_of(block_of(ROW), "must hold a mapping for each row, as in {}={{lns: {{label: LNS}}}}"),
    "measures": list_of(one_of(lambda: MEASURES), "[angular, removal]"),
    "fractions": list_of(must("must be a number in [0, 1]", lambda value: is_number(value) and value <= 1), "[0.1, 1]"),
    "published_curves": mapping_of(
        must("must be a list of [step, value], such as [[1000, 5], [3000, 85]]", is_curve),
        "must hold a list of [step, value] for each row",
    ),
    "finding": TEXT,
    "unknown": list_of(TEXT, "[seeds, error bars]"),
    "settings": settings_errors,
}
"""The fields of the block."""


def scale_errors(scales: Any) -> list[str]:
    """Scales that do not exist, and those without a mapping of overrides."""
    return block_of(dict.fromkeys(choices("scale"), OVERRIDES))("scales", scales)


def type_errors(paper: Any) -> list[str]:
    """Unknown fields and wrong types in a block, also of one file without its recipes."""
    return block_of(PAPER)("paper", paper)


def paper_block_errors(paper: Any) -> list[str]:
    """All errors of a whole block: those of `type_errors`, or else metrics and rows that do not exist."""
    if errors := type_errors(paper):
        return errors
    rows, metric = paper.get("rows", {}), paper.get("metric", "ppl")
    tasks = {task.strip() for task in paper.get("tasks", "").split(",")} - {"", "paper"}
    metrics = (*METRIC_FORMATS, "average", *PAPER_TASKS, *tasks)
    errors = one_of(lambda: metrics)("paper.metric", metric) if metric is not None else []
    for name in paper.get("published_curves", {}).keys() - rows.keys():
        errors.append(
            f"paper.published_curves.{name} is not a row: {nearest(name, rows) if rows else 'there are none'}"
        )
    for name, row in rows.items():
        field, published = f"paper.rows.{name}.published", row.get("published")
        if published is not None and not isinstance(published, Mapping) and metric is None:
            errors.append(f"{field}={published} has no metric: name it, as in {{ppl: {published}}}")
            continue
        figures = published if isinstance(published, Mapping) else {metric: published}
        for key, figure in figures.items():
            if key not in metrics and figures is published:
                errors.append(f"{field}.{key} is not a metric: {nearest(str(key), metrics)}")
            elif figure == 0 and key.startswith("ppl"):
                errors.append(f"{field}={figure}: a perplexity is greater than 0")
    return errors
