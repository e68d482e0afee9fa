"""A hook of MkDocs that makes a page of every notebook in docs/notebooks, a Python file with cells marked by # %%."""

import re
from pathlib import Path

from mkdocs.structure.files import File


def on_files(files, config):
    """Add the pages; the notebooks themselves stay in the site, for download."""
    for file in list(files):
        path = Path(file.src_uri)
        if path.parent.name == "notebooks" and path.suffix == ".py":
            text = to_markdown(file.content_string, path.name)
            files.append(File.generated(config, str(path.with_suffix(".md")), content=text))


def to_markdown(notebook: str, name: str) -> str:
    """The cells as Markdown: text as it is, code in blocks, and under the title a link to the file `name`."""
    link = f"*A notebook: [{name}]({name}) opens in VS Code, and with jupytext in Jupyter.*"
    parts = []
    for cell in re.split(r"^# %%", notebook, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if kind.strip() == "[markdown]":
            parts.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip())
        else:
            parts.append(f"```python\n{body.strip()}\n```")
    title, _, introduction = parts[0].partition("\n")
    return "\n\n".join([title, link, introduction.strip(), *parts[1:]])
