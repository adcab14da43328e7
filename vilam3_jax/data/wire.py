"""Values as msgpack bytes, the form of stored records and of frames between processes."""

from __future__ import annotations

from typing import Any

import msgpack


def pack(value: Any) -> bytes:
    """Returns the msgpack form of `value`."""
    packed = msgpack.packb(value, use_bin_type=True)
    assert packed is not None  # None is for packers that keep their buffer
    return packed
