"""What a run and a sweep print when they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cod_lightning.report.claims import Experiment, by_target, columns
from cod_lightning.report.words import compared, conclusion

Record = Mapping[str, Any]


def summary(record: Record, folder: Path) -> Group:
    """A run's figures, its variance by layer, and where it lies."""
    config = record["config"]
    table = Table(
        title=f"{config['experiment']}, {config['norm']['name']}, seed {record['seed']}", title_justify="left"
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures(record, config).items():
        table.add_row(name, value)
    parts: list[Any] = [table]
    if layers := record["history"].get("layers"):
        parts.append(variance_chart(layers["variance"][-1]))
    parts.append(Text(f"run folder: {folder}"))
    return Group(*parts)


def figures(record: Record, config: Record) -> dict[str, str]:
    shown = {
        "val_loss": f"{record['val_loss']:.4f}",
        "ppl": f"{record['ppl']:.2f}",
        "ppl_paper_protocol": f"{record['ppl_paper_protocol']:.2f}",
    }
    published = config["paper"].get("rows", {}).get(config["row"], {}).get("published")
    if published is not None:
        shown["published (full size and tokens)"] = f"{published:.2f}"
    return shown | {
        "steps": f"{record['steps']:,}",
        "tokens": f"{record['tokens']:,}",
        "tokens/s": f"{record['tokens_per_second']:,.0f}",
        "wall time": duration(record["wall_seconds"]),
        "parameters": f"{record['parameters']:,}",
    }


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def variance_chart(variance: Sequence[float], width: int = 48) -> Text:
    """One bar per layer, as long as the layer's share of the largest variance."""
    lines = ["variance of the residual stream after each layer"]
    top = max(variance)
    for layer, value in enumerate(variance, start=1):
        bar = "█" * max(round(width * value / top), 1) if top > 0 else ""
        lines.append(f"{layer:>5}  {bar} {value:.4g}")
    return Text("\n".join(lines))


def comparison(records: Sequence[tuple[str, Record | None]]) -> Table:
    """The runs of a sweep, best first; a run that did not finish says so.

    Args:
        records: what was varied, such as "norm=lns seed=1", and the record, None where a run failed.
    """
    table = Table(title="runs by validation loss", title_justify="left")
    table.add_column("run")
    names = ("val_loss", "ppl", "ppl_paper_protocol", "last-layer variance", "tokens", "tokens/s", "wall time")
    for name in names:
        table.add_column(name, justify="right")
    for label, record in sorted(records, key=lambda item: item[1]["val_loss"] if item[1] else float("inf")):
        if record is None:
            table.add_row(label, "failed")
            continue
        layers = record["history"].get("layers")
        table.add_row(
            label,
            f"{record['val_loss']:.4f}",
            f"{record['ppl']:.2f}",
            f"{record['ppl_paper_protocol']:.2f}",
            f"{layers['variance'][-1][-1]:.4g}" if layers else "not measured",
            f"{record['tokens']:,}",
            f"{record['tokens_per_second']:,.0f}",
            duration(record["wall_seconds"]),
        )
    return table


def experiments_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Experiments as `cod_lightning experiments` lists them; every row has the same keys."""
    table = Table(show_lines=True)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def result_table(title: str, rows: Sequence[Mapping[str, Any]], most: int) -> Table:
    """The rows of a measure, the first `most` of them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows[:most]:
        values = (row.get(column, "") for column in columns)
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    if len(rows) > most:
        table.caption = f"{most} of {len(rows):,} rows; the file has all"
    return table


def reproduced(experiments: Sequence[Experiment]) -> Group:
    """What was asked for, ours beside the paper's, and what the differences say."""
    parts: list[Any] = []
    for target, scales in by_target(experiments).items():
        for scale, group in scales.items():
            for column in columns(group):
                found = compared(column, published=True)
                table = Table(title=f"{target}, scale={scale}: {column.heading}", title_justify="left")
                for name in found.head:
                    table.add_column(name, justify="left" if name == "row" else "right")
                for row in found.rows:
                    table.add_row(*(Text(cell.strip("*"), "bold" if cell.startswith("**") else "") for cell in row))
                parts += [table, Text(conclusion(column) + "\n")]
    return Group(*parts)


def show(renderable: Any) -> None:
    """Print to standard output, at a fixed width where that is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(renderable)
