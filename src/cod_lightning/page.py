"""One page as Markdown, and as an HTML file that needs no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt


@dataclass(frozen=True)
class Table:
    """A table of text: cells may hold `code`, **bold** and *italics* as in Markdown."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: Collection[int] = (0,)
    """Columns aligned to the left."""

    def __str__(self) -> str:
        """The table as Markdown."""
        rule = ["---" if index in self.text_columns else "---:" for index in range(len(self.head))]
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def render(template: Path, **values: Any) -> str:
    """Fill in a jinja2 template; a value that is missing is an error.

    In templates of HTML values are escaped; in others, several empty lines become one.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=template.name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(template.name).render(values)
    return text if template.name.endswith(".html.j2") else re.sub(r"\n{3,}", "\n\n", text)


def html_fragment(markdown: str, images: Mapping[str, bytes]) -> str:
    """Markdown as HTML that needs no other file.

    Args:
        markdown: the content; HTML in it is shown as text.
        images: PNG files by file name; they replace the images of that name, whatever their folder.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    for token in [each for block in tokens for each in (block, *(block.children or ()))]:
        if token.type == "image":
            content = images[PurePosixPath(str(token.attrs["src"])).name]
            token.attrs["src"] = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            token.attrs["style"] = "max-width: 100%"
        elif token.type == "table_open":
            token.attrs["style"] = "display: block; overflow-x: auto"
    return parser.renderer.render(tokens, parser.options, {})


def html_page(title: str, markdown: str, images: Mapping[str, bytes]) -> str:
    """A page with a title around `html_fragment`."""
    body = html_fragment(markdown, images)
    return render(Path(__file__).with_name("page.html.j2"), title=title, body=body)
