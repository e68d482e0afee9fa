import io

from rich.console import Console

from cod_lightning.commands.terminal import WIDTH, result_table


def printed(table):
    console = Console(width=WIDTH, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_a_table_shows_as_many_rows_and_columns_as_it_has_room_for():
    rows = [{"layer": layer} | {f"on_{other}": layer / 7 for other in range(1, 40)} for layer in range(1, 9)]
    text = printed(result_table("causal", rows, 3))
    assert "3 of 8 rows, 13 of 40 columns; the file has all" in text
    assert "on_12" in text
    assert "on_13" not in text
    assert "0.4286" in text
    assert "…" not in text
    small = printed(result_table("removal", [{"layer": 1, "loss": 2.5}, {"layer": 2}], 3))
    assert "2.5" in small
    assert "the file has all" not in small
