"""A page of headings, paragraphs, tables and images, as Markdown and as HTML that needs no other file."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:1250px;margin:2em auto;padding:0 1em}img{max-width:100%}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{padding:.3em 1em;border-bottom:1px solid #ccc;text-align:right}"
    ".text{text-align:left}code{background:#f3f3f3;padding:0 .2em}"
)


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; `code`, **bold** and *italics* are marked as in Markdown, here and in tables."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of paragraphs."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Figures to the right, words to the left."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[int] = (0,)
    """Columns of words."""


@dataclass(frozen=True)
class Image:
    name: str
    """Of the file."""
    alt: str


Block: TypeAlias = Heading | Text | Items | Table | Image


def markdown(blocks: Sequence[Block], images: str) -> str:
    """The page as GitHub shows it.

    Args:
        blocks: in order.
        images: folder of the images, relative to the page.
    """
    return "\n\n".join(_markdown(block, images) for block in blocks) + "\n"


def _markdown(block: Block, images: str) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Items(texts):
            return "\n".join(f"- {text}" for text in texts)
        case Image(name, alt):
            return f"![{alt}]({images}/{name})"
        case Table(head, rows, words):
            rule = ["---" if index in words else "---:" for index in range(len(head))]
            lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
            return "\n".join(f"| {' | '.join(row)} |" for row in (lines[0], rule, *lines[1:]))


def page(title: str, blocks: Sequence[Block], images: Mapping[str, bytes]) -> str:
    """The page as HTML.

    Args:
        title: of the window.
        blocks: in order.
        images: by name, as PNG.
    """
    body = "\n".join(_html(block, images) for block in blocks)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>\n{body}\n</html>\n"
    )


def _html(block: Block, images: Mapping[str, bytes]) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Items(texts):
            return "<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>"
        case Image(name, alt):
            data = base64.b64encode(images[name]).decode()
            return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
        case Table(head, rows, words):
            styles = [' class="text"' if index in words else "" for index in range(len(head))]

            def line(tag: str, row: Sequence[str]) -> str:
                cells = zip(styles, row, strict=True)
                return f"<tr>{''.join(f'<{tag}{style}>{_inline(cell)}</{tag}>' for style, cell in cells)}</tr>"

            return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _inline(text: str) -> str:
    found = []
    for part in re.split(r"(`[^`]+`)", html.escape(text, quote=False)):
        if part.startswith("`") and len(part) > 1:
            found.append(f"<code>{part[1:-1]}</code>")
        else:
            bold = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", part)
            found.append(re.sub(r"\*([^*\s](?:[^*]*[^*\s])?)\*", r"<i>\1</i>", bold))
    return "".join(found)
