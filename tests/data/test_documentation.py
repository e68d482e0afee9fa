"""The corpus of installed documentation."""

import random
from string import ascii_lowercase

import pytest

from cod_lightning.data import documentation
from cod_lightning.data.documentation import NearDuplicates, docs, html_text


def test_html_is_text_with_a_line_for_each_block():
    html = (
        "<p>Use <code>Get&lt;T&gt;</code> &amp;\n see <a href='x'>it</a>.</p><ul><li>one</li><li> two</li></ul>a<br/>b"
    )
    assert html_text(html) == "Use Get<T> & see it.\none\ntwo\na\nb"
    assert html_text("plain  text") == "plain text"


def test_near_duplicates_are_dropped():
    duplicates = NearDuplicates()
    words = [f"word{n}" for n in range(200)]
    assert duplicates.is_new(" ".join(words))
    assert not duplicates.is_new(" ".join(words))
    assert not duplicates.is_new(" ".join(["Another", *words[1:150], "End."]).upper())
    assert duplicates.is_new(" ".join([*words[:20], *(f"fresh{n}" for n in range(180))]))


def test_a_text_without_shingles_is_not_a_duplicate():
    assert NearDuplicates().is_new("too short")


def prose(seed, words):
    """A paragraph of random words without digits."""
    letters = random.Random(seed)
    return " ".join("".join(letters.choices(ascii_lowercase, k=7)) for _ in range(words))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(source)`: a module with this source is all that is installed."""
    monkeypatch.setattr(documentation.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(documentation.importlib.util, "find_spec", lambda name: None)
    return (tmp_path / "module.py").write_text


def test_docstrings_are_parsed_and_joined(install):
    paragraphs = [prose(seed, words=20) for seed in range(21)]
    body = "\n\n".join(f"    {paragraph}" for paragraph in paragraphs[1:])
    code = f"    >>> {paragraphs[0]}\n\n    x: {'1, ' * 60}"
    install(f'"""{paragraphs[0]}"""\nraise SystemExit\nclass A:\n    """{body}\n\n{code}\n    """\n')
    assert docs() == ["\n".join(paragraphs[:11]), "\n".join(paragraphs[11:])]


def test_too_much_text_is_thinned_evenly(install, monkeypatch):
    documents = [prose(seed, words=201) for seed in range(100)]
    monkeypatch.setattr(documentation, "DOCS_CHARACTERS", 25 * len(documents[0]))
    install("".join(f'class A:\n    """{document}"""\n' for document in documents))
    selected = [documents.index(document) for document in docs()]
    assert selected == sorted(selected)
    assert 23 <= len(selected) <= 25
    assert {number // 10 for number in selected} == set(range(10))


def test_docs_are_deterministic_prose_without_markup():
    units = documentation._units()
    assert len(units) > 500
    first = [paragraph for unit in units[::160] for paragraph in documentation._unit_paragraphs(unit)]
    second = [paragraph for unit in units[::160] for paragraph in documentation._unit_paragraphs(unit)]
    assert first == second
    assert sum(map(len, first)) > 100_000
    assert not any("<p>" in paragraph or "&lt;" in paragraph for paragraph in first)
