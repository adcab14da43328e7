"""The opcode reader agrees with pickle on plain values and refuses everything else."""

import collections
import datetime
import fractions
import os
import pickle
import pickletools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.datasets import pickle_reader
from vilam3_jax.datasets.pickle_reader import PickleError
from vilam3_jax.errors import UserError

SCALARS = (
    st.none() | st.booleans() | st.integers(-(1 << 300), 1 << 300) | st.floats(allow_nan=False) | st.text()
)
KEYS = SCALARS | st.tuples(SCALARS, SCALARS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(KEYS, inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=20,
)


def same(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(a, b) and same(one[a], other[b]) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other and repr(one) == repr(other)


@given(VALUES, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_reads_what_pickle_writes(value, protocol):
    assert same(pickle_reader.parse(pickle.dumps(value, protocol)), value)
    assert same(pickle_reader.parse(pickletools.optimize(pickle.dumps(value, protocol))), value)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_give_a_value_or_one_error(data):
    try:
        pickle_reader.parse(data)
    except PickleError as error:
        assert "\n" not in str(error)


@given(VALUES, st.integers(0, 5), st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_pickles_give_a_value_or_one_error(value, protocol, data):
    whole = bytearray(pickle.dumps(value, protocol))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        pickle_reader.parse(bytes(whole))
    except PickleError as error:
        assert "\n" not in str(error)


class Calls:
    def __reduce__(self):
        return os.system, ("echo called",)


class State:
    pass


def global_object(name):
    return b"c" + name.replace(".", "\n").encode() + b"\n."


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "value",
    [
        Calls(),
        State(),
        {1, 2},
        frozenset({1}),
        b"bytes",
        bytearray(b"x"),
        1j,
        datetime.date(2020, 1, 1),
        collections.OrderedDict(a=1),
        fractions.Fraction(1, 2),
        range(3),
        len,
        dict,
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_are_refused_by_opcode(value, protocol, capfd):
    with pytest.raises(PickleError, match=r"opcode [A-Z0-9_]+ at byte \d+ is refused; only dict, list"):
        pickle_reader.parse(pickle.dumps([value], protocol))
    assert "called" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("data", "opcode"),
    [
        (global_object("os.system"), "GLOBAL"),
        (b"(S'echo called'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'echo called'\no.", "GLOBAL"),
        (b"P7\n.", "PERSID"),
        (b"K\x01Q.", "BINPERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02\x83\x01\x00.", "EXT2"),
        (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        (b"\x8c\x02os\x8c\x06system\x93.", "STACK_GLOBAL"),
        (b")R.", "REDUCE"),
        (b"}b.", "BUILD"),
        (b")\x81.", "NEWOBJ"),
        (b"\x8f.", "EMPTY_SET"),
        (b"\x97.", "NEXT_BUFFER"),
    ],
)
def test_hostile_opcodes_are_named(data, opcode, capfd):
    with pytest.raises(PickleError, match=f"opcode {opcode} at byte"):
        pickle_reader.parse(data)
    assert "called" not in capfd.readouterr().out


def test_python_2_texts_are_utf8():
    assert pickle_reader.parse(b"U\x03d\xc3\xa9.") == "dé"
    assert pickle_reader.parse(b"S'yes'\np0\n.") == "yes"
    with pytest.raises(PickleError, match="damaged"):
        pickle_reader.parse(b"U\x01\xff.")


def doubling(levels, kind: type = list):
    value = kind(["x"])
    for _ in range(levels):
        value = kind([value, value])
    return value


def test_shared_references_do_not_double_without_end(monkeypatch):
    assert pickle_reader.parse(pickle.dumps(doubling(10))) == doubling(10)
    monkeypatch.setattr(pickle_reader, "_MAX_DEPTH", 100)
    for kind in (list, tuple):
        with pytest.raises(PickleError, match="refers to its values more than"):
            pickle_reader.parse(pickle.dumps(doubling(60, kind)))


def test_hashing_does_not_follow_nested_keys():
    # A dict key of 60 nested tuples, each with the previous one twice: hashing it never ends.
    key = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))
    with pytest.raises(PickleError, match="key of a dict"):
        pickle_reader.parse(b"}" + key + b"Ns.")


def test_nested_and_circular_values_are_refused():
    with pytest.raises(PickleError, match="nested more than 32"):
        pickle_reader.parse(b"]" * 100_000 + b"a" * 99_999 + b".")
    circle = []
    circle.append(circle)
    with pytest.raises(PickleError, match="contains itself"):
        pickle_reader.parse(pickle.dumps(circle))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"K\x01",
        b"(.",
        b"K\x01K\x02.",
        b"N.N.",
        b"h\x07.",
        b"]K\x01u.",
        b"a.",
        b"(K\x01d.",
        b"\xff.",
        b"X" + struct.pack("<I", 1 << 31) + b"short.",
        b"\x8d" + struct.pack("<Q", 1 << 62) + b"short.",
        b"}]Ns.",
    ],
)
def test_damaged_data_is_one_sentence(data):
    with pytest.raises(PickleError) as caught:
        pickle_reader.parse(data)
    assert "\n" not in str(caught.value)


def test_limits(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(PickleError, match="more than 5 opcodes"):
        patch.setattr(pickle_reader, "_MAX_OPCODES", 5)
        pickle_reader.parse(pickle.dumps([1, 2, 3]))
    with pytest.raises(PickleError, match="8192 bits"):
        pickle_reader.parse(pickle.dumps(1 << 100_000))
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps([Calls()]))
    with pytest.raises(UserError, match=r"a\.pkl: opcode"):
        pickle_reader.read(path)
    monkeypatch.setattr(pickle_reader, "_MAX_FILE_BYTES", 3)
    with pytest.raises(UserError, match="limit"):
        pickle_reader.read(path)
