"""Two processes, whose devices share one model: what one process with the same devices says."""

from __future__ import annotations

import json

import pytest

from tests.training.process_worlds import run_script
from vilam3_jax.convert.exporter import export_folder

SCRIPT = """
    import json, sys
    from absl import flags
    import vilam3_jax
    from vilam3_jax.data.tokenizer import Tokenizer
    from vilam3_jax.errors import UserError
    from vilam3_jax.runtime import compat, processes
    values = flags.FlagValues()
    processes.define_flags(values)
    values(["test", *sys.argv[2:]])
    given = json.loads(sys.argv[1])
    with processes.group("program", **processes.flag_values(values)):
        compat.use_cpu_devices(given["devices"])
        said = {}
        options = dict(annotations=given["annotations"], expert_host="off", max_length=1024, dtype="float32")
        for kind in ("export", "vila"):
            with vilam3_jax.load(given[kind], mesh=-1, **options) as model:
                asked = dict(modality="CT", max_new_tokens=8)
                chat = model.chat(given["volume"], experts=False, **asked)
                said[kind] = [
                    chat.ask("Is the liver visible?").answer,
                    chat.ask("Are you sure?").answer,
                    model.generate("The results are", max_new_tokens=12, temperature=1.2, seed=3).text,
                    "".join(model.stream("The results are", max_new_tokens=12)),
                ]
                said[f"scores {kind}"] = model.score(given["film"], "Is there pneumonia?", ["yes", "no"])
                decode, spoken = Tokenizer.decode, iter(["<ORGANS(organs)>", "It is."])
                Tokenizer.decode = lambda self, ids: next(spoken)
                reply = model.ask(given["volume"], "Is the liver visible?", **asked)
                Tokenizer.decode = decode
                said[kind] += [reply.transcript.annotation.status, reply.answer]
                said[kind].append(int(reply.overlay.astype(int).sum()))
                try:
                    model.ask(given["volume"] if processes.is_primary_process() else "nowhere.png", "What?")
                except UserError as error:
                    said[f"error {kind}"] = str(error)
        if processes.is_primary_process():
            print("SAID", json.dumps(said))
"""


def said(given, processes):
    done = run_script(SCRIPT, processes, json.dumps({**given, "devices": 2 // processes}))
    assert [code for code, *_ in done] == [0] * processes, done
    assert not any("SAID" in out for _, out, _ in done[1:])
    (line,) = (line for line in done[0][1].splitlines() if line.startswith("SAID"))
    return json.loads(line.split(" ", 1)[1])


@pytest.mark.slow
def test_two_processes_say_what_one_says(export, world, tmp_path):
    export_folder(export, tmp_path / "vila")
    given = {"export": str(export), "vila": str(tmp_path / "vila")}
    given |= {name: str(getattr(world, name)) for name in ("volume", "film", "annotations")}
    one, two = said(given, 1), said(given, 2)
    for kind in ("export", "vila"):
        assert two[kind] == one[kind] and len(set(map(str, one[kind]))) == len(one[kind])
        assert two[f"scores {kind}"] == pytest.approx(one[f"scores {kind}"], abs=1e-4)
        assert f"error {kind}" not in one
        assert "process 1: " in (error := two[f"error {kind}"]) and "nowhere.png: no such file" in error


def printed(done):
    """Lines that a process printed, without those of the collectives' library."""
    return [line for line in done[1].splitlines() if not line.startswith("[Gloo]")]


COMMAND = """
    import sys
    from vilam3_jax.cli import guarded
    from vilam3_jax.evals import main as evaluate
    from vilam3_jax.inference import chat
    from vilam3_jax.runtime import compat
    compat.use_cpu_devices(int(sys.argv[2]))
    command = {"evaluate": evaluate.main, "chat": chat.main}[sys.argv[1]]
    sys.exit(guarded(sys.argv[1], command, sys.argv[3:]))
"""


@pytest.mark.slow
def test_two_processes_evaluate(export, world, tmp_path):
    arguments = ["--protocol=quickstart@1", f"--data={world.data}", f"--checkpoint={export}"]
    arguments += ["--batch_size=4", "--max_length=1536", "--arm=stage4_no_experts", "--mesh=tensor=-1"]
    rows = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = run_script(COMMAND, processes, "evaluate", str(2 // processes), *arguments, f"--out={out}")
        assert [code for code, *_ in done] == [0] * processes, done
        assert f"12 questions: {out}" in done[0][1]
        assert not any(printed(one) for one in done[1:])
        rows.append([json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 12


@pytest.mark.slow
def test_a_session_of_two_processes(export, world, tmp_path):
    """The primary process reads the lines; all answer."""
    script = COMMAND.replace("import sys", "import builtins, sys").replace(
        "    command =",
        "    lines = iter(LINES)\n    builtins.input = lambda prompt: next(lines)\n    command =",
    )
    lines = [
        "What is this?",
        "/slice 3",
        "And here?",
        "/image nowhere.png",
        f"/save {tmp_path / 'kept'}",
        "/quit",
    ]
    script = script.replace("LINES", repr(lines))
    arguments = [f"--checkpoint={export}", f"--image={world.volume}", "--experts=off", "--max_new_tokens=4"]
    done = run_script(script, 2, "chat", "1", *arguments)
    assert [code for code, *_ in done] == [0, 0], done
    assert "[image] axial slice 3 of 0 to 15" in done[0][1] and "nowhere.png: no such file" in done[0][1]
    assert printed(done[1]) == []
    assert (tmp_path / "kept" / "transcript.txt").read_text().count("user: ") == 2
