"""The corpus of installed documentation."""

from cod_lightning.data import documentation
from cod_lightning.data.documentation import NearDuplicates, html_text


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


def test_docstrings_are_parsed_and_joined(tmp_path):
    prose = "A paragraph of plain English words extends " * 3 + "and ends here"
    body = "\n\n".join(f"    {prose} in place number {word}." for word in ["1st", "2nd", "3rd", "4th", "5th", "6th"])
    code = f"    >>> {prose}\n\n    x: {'1, ' * 60}"
    source = f'"""{prose}."""\nraise SystemExit\nclass A:\n    """{body}\n\n{code}\n    """\n'
    (tmp_path / "module.py").write_text(source)
    paragraphs = documentation._unit_paragraphs([tmp_path / "module.py"])
    assert paragraphs[0] == prose + "."
    assert len(paragraphs) == 7
    assert [text.count("\n") for text in documentation.join_paragraphs(paragraphs * 3)] == [10, 9]


def test_too_much_text_is_thinned_evenly():
    selected = documentation._thin_out([f"{n:04}" for n in range(1000)], 1000)
    assert 245 <= len(selected) <= 250
    assert {int(text) // 100 for text in selected} == set(range(10))


def test_docs_are_deterministic_prose_without_markup():
    units = documentation._units()
    assert len(units) > 500
    first = [paragraph for unit in units[::160] for paragraph in documentation._unit_paragraphs(unit)]
    second = [paragraph for unit in units[::160] for paragraph in documentation._unit_paragraphs(unit)]
    assert first == second
    assert sum(map(len, first)) > 100_000
    assert not any("<p>" in paragraph or "&lt;" in paragraph for paragraph in first)
