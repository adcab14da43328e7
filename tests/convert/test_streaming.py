"""Imports leaf by leaf: interrupted, resumed, verified, split over processes, in bounded memory."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from foreign import LLAMA, llama_weights, write_folder

from tests.in_memory import fill
from vilam3_jax.checkpoints import exports
from vilam3_jax.convert.importer import import_model, open_source
from vilam3_jax.convert.safetensors_files import SafetensorsFolder
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import compat


@pytest.fixture
def small_leaves(monkeypatch):
    monkeypatch.setattr(exports, "LEAF_BYTES", 9_000)
    monkeypatch.setattr(exports, "_PART_BYTES", 9_000)


def load_all(folder: Path) -> dict[str, np.ndarray]:
    """Every parameter of an export, concatenated from its stored rows."""
    return {
        path: np.concatenate([rows.read() for rows in ranges]) if len(ranges) > 1 else ranges[0].read()
        for path, ranges in exports.stored_rows(folder).items()
    }


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def stop(written: int, total: int) -> None:
    """A progress function that interrupts in the middle."""
    if written > total / 2:
        raise KeyboardInterrupt


def test_large_parameters_are_stored_in_several_leaves(tmp_path, small_leaves):
    source = write_folder(tmp_path / "theirs", LLAMA, llama_weights())
    import_model(source, tmp_path / "ours")
    stored = exports.stored_rows(tmp_path / "ours")
    # 3 layers of 32 x 64 float32 are 24 kB; 288 x 32 are 37 kB.
    assert [rows.start for rows in stored["llm/layers/mlp/gate/kernel"]] == [0, 1, 2]
    assert [rows.start for rows in stored["llm/embed/embedding"]] == [0, 58, 116, 174, 232]
    assert len({rows.folder for ranges in stored.values() for rows in ranges}) > 5
    expected = fill(open_source(source))
    same(load_all(tmp_path / "ours"), expected)
    mesh = compat.make_mesh((2, 2), ("a", "b"), jax.devices()[:4])
    for spec in ((), ("a",), (None, "b"), ("b", "a")):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        wanted = {
            path: jax.ShapeDtypeStruct(expected[path].shape, np.float32, sharding=place)
            for path in ("llm/embed/embedding", "llm/lm_head/kernel")
        }
        found = exports.load_params(tmp_path / "ours", wanted)
        for path, value in found.items():
            np.testing.assert_array_equal(value, expected[path])
            assert value.sharding == place


def test_an_interrupted_import_goes_on(tmp_path, small_leaves, monkeypatch):
    source = write_folder(tmp_path / "theirs", LLAMA, llama_weights(), shards=2)
    reads: list[str] = []
    read = SafetensorsFolder.__call__
    monkeypatch.setattr(
        SafetensorsFolder,
        "__call__",
        lambda self, name, *rows: (reads.append(name), read(self, name, *rows))[1],
    )

    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "ours", progress=stop)
    assert not (tmp_path / "ours").exists() and (tmp_path / ".ours.partial").exists()
    first = len(reads)
    import_model(source, tmp_path / "ours")
    second = len(reads) - first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    same(load_all(tmp_path / "ours"), fill(open_source(source)))
    third = len(reads) - first - second
    assert second < 0.7 * third < 0.7 * (first + second)


@pytest.mark.parametrize("change", ["source", "dtype"])
def test_what_another_import_left_is_not_used(tmp_path, small_leaves, change):
    source = write_folder(tmp_path / "theirs", LLAMA, llama_weights())

    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "ours", progress=stop)
    if change == "source":
        write_folder(tmp_path / "theirs", LLAMA, llama_weights(seed=1))
    dtype = "bfloat16" if change == "dtype" else "float32"
    import_model(source, tmp_path / "ours", dtype=dtype)
    expected = fill(open_source(source), ml_dtypes.bfloat16 if change == "dtype" else np.float32)
    same(load_all(tmp_path / "ours"), expected)


def test_a_package_that_cuts_otherwise_starts_over(tmp_path, small_leaves, monkeypatch):
    source = write_folder(tmp_path / "theirs", LLAMA, llama_weights())

    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "ours", progress=stop)
    monkeypatch.setattr(exports, "_PART_BYTES", 30_000)
    import_model(source, tmp_path / "ours", verify=False)
    same(load_all(tmp_path / "ours"), fill(open_source(source)))


def test_two_imports_into_one_place(tmp_path, small_leaves):
    source = write_folder(tmp_path / "theirs", LLAMA, llama_weights())
    other = write_folder(tmp_path / "others", LLAMA, llama_weights(seed=1))
    said: list[str] = []

    def second(written: int, total: int) -> None:
        if not said:
            with pytest.raises(UserError) as caught:
                import_model(other, tmp_path / "ours")
            said.append(str(caught.value))

    import_model(source, tmp_path / "ours", progress=second)
    assert "another process is writing here" in said[0]
    same(load_all(tmp_path / "ours"), fill(open_source(source)))


@pytest.mark.parametrize("shape", [(7, 11, 13), (1, 5000), (5000,), (3, 3000)])
def test_no_leaf_is_larger_than_the_limit(small_leaves, shape):
    leaves = exports.stored_leaves({"x": jax.ShapeDtypeStruct(shape, np.float32)})
    assert sum(leaf.shape[0] for leaf in leaves) == shape[0]
    row = 4 * int(np.prod(shape[1:]))
    assert all(leaf.bytes <= max(9_000, row) for leaf in leaves)


def test_a_disk_that_forgets_is_noticed(tmp_path, small_leaves, monkeypatch):
    source = write_folder(tmp_path / "theirs", LLAMA, llama_weights())
    digest = exports._digest
    seen: list[str] = []

    def forgetful(array: jax.Array) -> str:
        seen.append(digest(array))
        return seen[-1] if len(seen) != 45 else "0" * 64

    monkeypatch.setattr(exports, "_digest", forgetful)
    with pytest.raises(UserError, match=r"llm/.* reads back as other bytes than were written"):
        import_model(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    seen.clear()
    import_model(source, tmp_path / "ours", verify=False)
    assert not seen


def test_checksums_are_those_of_the_files(tmp_path):
    import hashlib

    source = write_folder(tmp_path / "theirs", LLAMA, llama_weights(), shards=2)
    import_model(source, tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / "provenance.json").read_text())
    for entry in said["parts"]["llm"]["source"]:
        assert entry["sha256"] == hashlib.sha256((source / entry["file"]).read_bytes()).hexdigest()
    for path, value in load_all(tmp_path / "ours").items():
        assert said["sha256"][path] == hashlib.sha256(value.tobytes()).hexdigest()


PROCESS = """
    import sys
    import jax
    process, port, source, out = int(sys.argv[1]), *sys.argv[2:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, process)
    from vilam3_jax.checkpoints import exports
    from vilam3_jax.convert import importer, safetensors_files
    exports.LEAF_BYTES, exports._PART_BYTES = 40_000, 9_000
    read, count = safetensors_files.SafetensorsFolder.__call__, 0
    def counted(self, name, start, stop):
        global count
        rows = read(self, name, start, stop)
        count += rows.nbytes
        return rows
    safetensors_files.SafetensorsFolder.__call__ = counted
    importer.import_model(source, out)
    print("bytes", count)
"""


@pytest.mark.slow
def test_two_processes_share_the_reading(tmp_path):
    source = write_folder(
        tmp_path / "theirs", {**LLAMA, "num_hidden_layers": 4}, llama_weights(num_hidden_layers=4)
    )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [str(port), str(source), str(tmp_path / "ours")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROCESS), str(process), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert all(process.returncode == 0 for process in running), said
    size = (source / "model.safetensors").stat().st_size
    for out, _ in said:
        assert int(out.split("bytes")[1]) < 0.7 * size
    same(load_all(tmp_path / "ours"), fill(open_source(source)))


MEMORY = """
    import re, sys
    from pathlib import Path
    from vilam3_jax.checkpoints import exports
    from vilam3_jax.convert.exporter import export_folder
    from vilam3_jax.convert.importer import import_model
    import jax
    exports.LEAF_BYTES, exports._PART_BYTES = 250_000_000, 1 << 24
    jax.block_until_ready(jax.numpy.zeros(3))
    # getrusage would include the memory of the parent process.
    peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    start = peak()
    import_model(sys.argv[1], sys.argv[2])
    print("import", peak() - start)
    export_folder(sys.argv[2], sys.argv[3])
    print("export", peak() - start)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_leaf(tmp_path):
    sizes = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8000,
        tie_word_embeddings=False,
    )
    source = write_folder(
        tmp_path / "theirs", {**LLAMA, **sizes}, llama_weights(**sizes), shards=4, dtype=ml_dtypes.bfloat16
    )
    total = sum(file.stat().st_size for file in source.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(source), tmp_path / "ours", tmp_path / "back"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    peaks = dict(line.split() for line in done.stdout.splitlines())
    largest = 24 * 1024 * 4096 * 2  # bytes of a stacked kernel, stored whole
    assert total > 4 * largest
    # Orbax holds what it writes or reads twice, and two files are read ahead. Measured, in largest kernels:
    # import 2.6 to 2.7, export 3.0 to 3.2; with one that is not freed 3.5 to 3.6 and 3.9 to 4.2.
    for program in ("import", "export"):
        assert int(peaks[program]) < 3.35 * largest, peaks
