"""Tables and lists as users have them."""

import gzip

import pytest

from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

COLUMNS = {"name": ("name",), "text": ("text",)}


def rows(folder, content, file="a.csv"):
    (folder / file).write_bytes(content)
    source = SourceFolder(folder)
    return list(source.table(file, COLUMNS)), source.notes


def test_rows_with_more_cells_than_the_header_are_not_used(tmp_path):
    content = b'name,text\na,left lobe, right lung\nb,"left, right"\n\nc,end,\nd,1,2\n'
    found, notes = rows(tmp_path, content)
    assert [row["text"] for row in found] == ["", "left, right", "end", ""]
    assert [row["name"] for row in found] == ["", "b", "c", ""]
    (note,) = notes
    assert note.startswith("a.csv has 2 rows with more cells than its header, the first in line 2,")


def test_bytes_that_are_no_utf8_spoil_one_text(tmp_path):
    found, _ = rows(tmp_path, "name,text\na,Sj\xf6gren\nb,fine\n".encode("latin-1"))
    assert found[1]["text"] == "fine"
    with pytest.raises(UnicodeEncodeError):
        found[0]["text"].encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,text\na,b\n".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("n\xe4me,text\na,b\n".encode("latin-1"), "header is not UTF-8 text; save it as UTF-8"),
        (b"name,text,text\na,b,c\n", "has two columns text; remove or rename one of them"),
        (gzip.compress(b"name,text\na,b\n" * 999, mtime=0)[:-20], "cannot be read"),
        (gzip.compress(b"name,text\na,b\n" * 999, mtime=0)[:20] + b"\xff" * 40, "cannot be read"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(UserError, match=f"a.csv: .*{message}"):
        rows(tmp_path, content)


def test_what_is_missing_is_told_once(tmp_path):
    with pytest.raises(UserError, match=r": a\.csv or b\.csv, c missing\. Fetch it\.$"):
        SourceFolder(tmp_path, "Fetch it.").require(["a.csv", "a.csv.gz", "x/a.csv", "b.csv", "x/b.csv"], "c")


@pytest.mark.parametrize("end", [b"", b"\xff" * 40])
def test_damaged_packed_lists(tmp_path, end):
    (tmp_path / "a.json").write_bytes(gzip.compress(b"[" + b"1," * 9999 + b"1]")[:30] + end)
    source = SourceFolder(tmp_path)
    with pytest.raises(UserError, match=r"a\.json: is not JSON .*; download it again"):
        source.json("a.json")
    with pytest.raises(UserError, match=r"a\.json: is not text .*; download it again"):
        source.lines("a.json")
