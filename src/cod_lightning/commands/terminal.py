"""Tables, charts and progress that the commands print."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from cod_lightning import page
from cod_lightning.config.schema import METRIC_FORMATS, printed_metrics
from cod_lightning.measure.result import format_cell

if TYPE_CHECKING:
    from cod_lightning.train.estimate import Estimate

Record = Mapping[str, Any]
WIDTH = 120
"""Characters in a line when the output is not a terminal."""
BAR = 48
"""Characters in the longest bar of a chart."""


def run_summary(record: Record, folder: Path) -> Group:
    """The metrics of a run, a chart of its variance by layer, and its folder."""
    config = record["config"]
    title = f"{config['experiment']}, {config['norm']['name']}, seed {record['seed']}"
    table = page.Table(["metric", "value"], list(metric_lines(record).items()))
    parts: list[Any] = [rich_table(title, table)]
    if layers := record["history"].get("layers"):
        parts.append(variance_chart(layers["variance"][-1]))
    parts.append(Text(f"run folder: {folder}"))
    return Group(*parts)


def metric_lines(record: Record) -> dict[str, str]:
    """The lines of a run's table: loss and perplexities, the published value if there is one, and the cost."""
    config = record["config"]
    shown = {name: f"{record[name]:{METRIC_FORMATS[name]}}" for name in printed_metrics(record, config["protocol"])}
    published = config["paper"].get("rows", {}).get(config["row"], {}).get("published")
    if published is not None:
        values = published if isinstance(published, Mapping) else {"": published}
        shown |= {f"{name} published (full size and tokens)".strip(): f"{value:.2f}" for name, value in values.items()}
    return shown | {
        "steps": f"{record['steps']:,}",
        "tokens": f"{record['tokens']:,}",
        "tokens/s": f"{record['tokens_per_second']:,.0f}",
        "wall time": format_duration(record["wall_seconds"]),
        "parameters": f"{record['parameters']:,}",
    }


@contextmanager
def progress_bar(label: str) -> Generator[Callable[[int, int], None]]:
    """A function of done and total that moves a bar on stderr, shown only on a terminal."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(escape(label), total=None)

        def update(done: int, total: int) -> None:
            bars.update(bar, completed=done, total=total or None)

        yield update


def format_duration(seconds: float) -> str:
    """Such as "2 h 05 min", "1 min 30 s" or "12 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def variance_chart(variance: Sequence[float | None]) -> Text:
    """One bar per layer, in proportion to the largest variance; no bar for a variance that is not finite.

    Args:
        variance: of each layer, from the first.
    """
    lines = ["variance of the residual stream after each layer"]
    top = max((value for value in variance if is_finite(value)), default=0)
    for layer, value in enumerate(variance, start=1):
        if not is_finite(value):
            lines.append(f"{layer:>5}  not finite")
            continue
        bar = "█" * max(round(BAR * value / top), 1) if top > 0 else ""
        lines.append(f"{layer:>5}  {bar} {value:.4g}")
    return Text("\n".join(lines))


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether a value of a record is finite; records store null for NaN and Inf."""
    return value is not None and math.isfinite(value)


def estimate_table(estimates: Sequence[tuple[str, Estimate]]) -> Table:
    """One column for each run, with its label; a line that is empty for all runs is omitted."""
    table = rich_table("estimated cost of a run", page.Table(["", *(label for label, _ in estimates)], []))
    for section in zip(*(estimate_lines(estimate) for _, estimate in estimates), strict=True):
        for name in section[0]:
            values = [lines[name] for lines in section]
            if any(values):
                table.add_row(name, *values)
        table.add_section()
    return table


def estimate_lines(estimate: Estimate) -> list[dict[str, str]]:
    """The sections of an estimate's table; values that do not apply are empty."""
    memory, documents = estimate.memory, estimate.documents
    published = estimate.published_tokens
    return [
        {
            "parameters": f"{estimate.parameters:,}",
            "without embeddings and head": f"{estimate.non_embedding:,}",
            "token positions": f"{estimate.positions:,}",
            "tokens, as published": f"{published:,.0f}" if published else "",
            "FLOPs per token": f"{estimate.flops_per_token:.4g}",
            "FLOPs": f"{estimate.flops:.4g}",
        },
        {
            "hardware": f"{estimate.gpus} x {estimate.hardware}, {estimate.strategy}",
            "precision": estimate.precision,
            "activation checkpointing": estimate.checkpointing,
            "micro-batch size": f"{estimate.micro_batch_size:,}",
            "largest micro-batch size": f"{estimate.max_micro_batch_size:,}",
        },
        {
            "weights": format_bytes(memory.weights),
            "gradients": format_bytes(memory.gradients),
            "Adam's moments": format_bytes(memory.moments),
            "bfloat16 copies": format_bytes(memory.copies),
            "communication": format_bytes(memory.communication),
            "activations": format_bytes(memory.activations),
            "loss or recomputation": format_bytes(memory.work),
            "memory per device": f"{format_bytes(memory.total)} of {format_bytes(estimate.device_memory)}",
        },
        {
            "prepared tokens": format_bytes(estimate.token_bytes),
            "documents of C4": f"{documents:,}" if documents else "",
            "text of these documents": format_bytes(estimate.text_bytes),
            "compressed text": format_bytes(estimate.download_bytes),
        },
        {
            "MFU": f"{estimate.mfu:g}",
            "time": format_duration(3600 * estimate.hours),
            "GPU-hours": f"{estimate.gpu_hours:,.4g}",
        },
    ]


def format_bytes(count: int | None) -> str:
    """A number of bytes with a decimal unit, such as "1.5 GB"; "" for zero and None."""
    if not count:
        return ""
    power = min((len(str(count)) - 1) // 3, 5)
    return f"{count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"


def result_table(title: str, rows: Sequence[Mapping[str, Any]], max_rows: int) -> Table:
    """The first `max_rows` rows of a measure, with the columns that fit into `WIDTH`."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = {name: [format_cell(row.get(name, "")) for row in rows[:max_rows]] for name in columns}
    widths = {name: max(map(len, [name, *values])) + 3 for name, values in cells.items()}
    shown = [name for index, name in enumerate(columns) if sum(widths[c] for c in columns[: index + 1]) < WIDTH]
    table = rich_table(title, page.Table(shown, list(zip(*(cells[name] for name in shown), strict=True)), ()))
    counts = ((max_rows, len(rows), "rows"), (len(shown), len(columns), "columns"))
    if truncated := [f"{part} of {whole:,} {name}" for part, whole, name in counts if part < whole]:
        table.caption = f"{', '.join(truncated)}; the file has all"
    return table


def rich_table(title: str, table: page.Table, **options: Any) -> Table:
    """A table for the terminal; the options are those of `rich.table.Table`."""
    rich = Table(title=title, title_justify="left", **options)
    for index, name in enumerate(table.head):
        rich.add_column(name, justify="left" if index in table.text_columns else "right", overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(cell.replace("**", ""), "bold" if cell.startswith("**") else "") for cell in row))
    return rich


class PipeConsole(Console):
    """A console that leaves a closed pipe to the command line, instead of ending with status 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(renderable: Any) -> None:
    """Print to standard output, with `WIDTH` characters a line if it is not a terminal; text is not read as markup."""
    width = None if Console().is_terminal else WIDTH
    PipeConsole(width=width, markup=False, emoji=False).print(renderable)
