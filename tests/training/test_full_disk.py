"""A full disk: a one-line error, no partial files, and the last good checkpoint remains."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PROGRAM = """
    import resource, sys
    import jax
    from vilam3_jax.checkpoints import exports, run_checkpoints
    from vilam3_jax.errors import UserError
    from vilam3_jax.runtime import logs

    logs.configure()  # as every command does

    workdir = sys.argv[1]
    saved = run_checkpoints.RunCheckpoints(workdir)
    saved.save(1, {"w": jax.numpy.zeros((4, 4))}, {}, {})
    saved.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # simulates a full disk
    large = jax.random.normal(jax.random.key(0), (1000, 1000))
    saved = run_checkpoints.RunCheckpoints(workdir)
    def save():
        saved.save(2, {"w": large}, {}, {})
        saved.wait()
    def export():
        exports.export_model(workdir + "/export", {"w": large}, {"kind": "x"}, None, {})
    for action in (save, export):
        try:
            action()
        except UserError as error:
            print(action.__name__, error)
    print("latest", run_checkpoints.RunCheckpoints(workdir).steps()[-1])
"""


def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    save, export, latest = done.stdout.splitlines()
    assert save.startswith(f"save {tmp_path}/checkpoints: cannot be written") and "free space" in save
    assert export.startswith(f"export {tmp_path}/export: cannot be written")
    assert latest == "latest 1"
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
