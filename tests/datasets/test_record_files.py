"""Streaming lists of records gives the same records as the standard library."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.datasets import record_files
from vilam3_jax.errors import UserError

_leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def walked(tmp_path, content, name="list.json"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = list(record_files.walk(file))
    for place, data in found:
        assert record_files.read(str(file), place) == data[: place.length]
    return [data for _, data in found]


@settings(max_examples=80, deadline=None)
@given(values=st.lists(_values), piece=st.integers(1, 40), ascii=st.booleans(), indent=st.none() | st.just(2))
def test_arrays_read_as_the_standard_library_reads_them(
    tmp_path_factory, monkeypatch_module, values, piece, ascii, indent
):
    monkeypatch_module.setattr(record_files, "_CHUNK", max(piece, 4))
    content = json.dumps(values, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass")
    found = walked(tmp_path_factory.mktemp("walk"), content)
    assert [json.loads(data.decode("utf-8", "surrogatepass")) for data in found] == json.loads(
        content.decode("utf-8", "surrogatepass")
    )


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_a_broken_record_is_one_record(tmp_path):
    found = walked(tmp_path, '[{"a": 1}, {"b": tru, "c": "]}\\""}, {"d": [2,]}, 7, "x", null, {"e": 3}]')
    assert [bytes(data) for data in found][0::6] == [b'{"a": 1}', b'{"e": 3}']
    kinds = []
    for data in found:
        try:
            record_files.parse(data)
            kinds.append("")
        except record_files.NotRecord as reason:
            kinds.append(str(reason))
    assert kinds == [
        "",
        "is not JSON",
        "is not JSON",
        "is a number, not an object",
        "is a text, not an object",
        "is null, not an object",
        "",
    ]


def test_lines_with_blanks_and_a_byte_order_mark(tmp_path):
    found = walked(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\n{broken\n{"b": "\xc3\xa9"}', "list.jsonl")
    assert len(found) == 3 and record_files.parse(found[2]) == {"b": "é"}
    with pytest.raises(record_files.NotRecord):
        record_files.parse(found[1])
    assert len(walked(tmp_path, '{"a": 1}\n{"a": 2}\n', "lines.json")) == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ('[{"a": 1}', "ends early after record 1"),
        ('[{"a": 1}, {"b": "tex', "ends within record 2"),
        ('[{"a": 1} {"b": 2}]', "lacks a comma after record 1"),
        ('[{"a": 1},]', "is not JSON at record 2"),
        ('[{"a": 1}] [2]', "continues after the end"),
        ('{"data": [\n{"a": 1}\n]}', "neither a JSON list nor JSON lines"),
        ("id,image\n1,a.png\n", "neither a JSON list nor JSON lines"),
        ('[{"a": 1}]'.encode("utf-16"), "UTF-16"),
        (b"\x1f\x8b\x08rest", "gzip"),
    ],
)
def test_what_is_no_list_is_refused_by_name(tmp_path, content, words):
    with pytest.raises(UserError, match=words) as error:
        walked(tmp_path, content)
    assert "list.json" in str(error.value) and "\n" not in str(error.value)


def test_a_record_that_is_too_large_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(record_files, "_CHUNK", 16)
    large = {"text": ["x" * 30] * 10}
    for name, content in (
        ("list.json", json.dumps([{"a": 1}, large, {"b": 2}])),
        ("list.jsonl", "\n".join(map(json.dumps, [{"a": 1}, large, {"b": 2}]))),
    ):
        file = tmp_path / name
        file.write_text(content)
        found = [record_files.read(str(file), place) for place, _ in record_files.walk(file)]
        assert [len(data) > 100 for data in found] == [False, True, False]
        with pytest.raises(record_files.NotRecord, match="larger than 100 bytes"):
            record_files.parse(found[1])
        assert record_files.parse(found[2]) == {"b": 2}
