"""The chain of the quickstart: reuse, repetition and failure of steps."""

import json

import pytest

from vilam3_jax.data.experts.store import Annotation, AnnotationStore, AnnotationWriter
from vilam3_jax.errors import UserError
from vilam3_jax.quickstart import chain as quickstart


def writer(path, text="done"):
    """A command that appends to `path`, which shows how often it ran."""
    return ("-c", f"open({str(path)!r}, 'a').write({text!r})")


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Two steps after the samples; `texts` may be changed between runs."""
    run, samples = tmp_path / "run", tmp_path / "samples"
    samples.mkdir()
    texts = {"one": "1", "two": "2"}

    def samples_step(folder, size):
        return quickstart.Step("samples", writer(folder / "samples.json"), folder / "samples.json")

    def plan(folder, source, size, seed):
        return [
            quickstart.Step("one", writer(folder / "one", texts["one"]), folder / "one", ("samples",)),
            quickstart.Step("two", writer(folder / "two", texts["two"]), folder / "two", ("one",)),
        ]

    monkeypatch.setattr(quickstart, "samples_step", samples_step)
    monkeypatch.setattr(quickstart, "plan", plan)

    def go(fresh=False):
        quickstart.run_chain(run, samples, "default", fresh)
        return (run / "one").read_text(), (run / "two").read_text()

    return go, texts, run


def test_a_finished_step_is_reused(chain, capfd):
    go, _, run = chain
    assert go() == ("1", "2")
    assert go() == ("1", "2")
    assert "[2/3] one: reused" in capfd.readouterr().out
    record = json.loads((run / quickstart.RUN_FILE).read_text())
    assert record["steps"]["one"]["finished"] and record["machine"]["cores"] and record["peak_rss"] > 0


def test_a_changed_step_and_all_after_it_are_done_again(chain):
    go, texts, _ = chain
    go()
    texts["two"] = "two"
    assert go() == ("1", "two")
    texts["one"] = "one"
    assert go() == ("one", "two")


def test_fresh_starts_over(chain):
    go, _, run = chain
    go()
    (run / "left over").write_text("x")
    go(fresh=True)
    assert not (run / "left over").exists()


def test_a_failed_step_is_named_and_done_again(chain):
    go, texts, run = chain
    texts["two"] = "2"
    quickstart_plan = quickstart.plan

    def failing(folder, source, size, seed):
        steps = quickstart_plan(folder, source, size, seed)
        broken = ("-c", f"open({str(folder / 'two')!r}, 'w').write('half'); raise SystemExit(2)")
        return [steps[0], quickstart.Step("two", broken, folder / "two", ("one",))]

    quickstart.plan, kept = failing, quickstart.plan
    try:
        with pytest.raises(UserError, match=r"step two failed with exit code 2.*two\.log"):
            go()
    finally:
        quickstart.plan = kept
    assert not json.loads((run / quickstart.RUN_FILE).read_text())["steps"]["two"]["finished"]
    assert go() == ("1", "2")


def test_a_step_that_makes_nothing_is_an_error(chain, monkeypatch):
    go, _, _ = chain
    nothing = quickstart.Step("one", ("-c", "pass"), quickstart.Path("/nonexistent/one"), ())
    monkeypatch.setattr(quickstart, "plan", lambda *_: [nothing])
    with pytest.raises(UserError, match="one ended without /nonexistent/one"):
        go()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fma avx512_bf16 amx_bf16 amx_tile", "bfloat16"), ("fma avx512_bf16", "float32"), (None, "float32")],
)
def test_products_are_rounded_where_the_processor_gains_by_it(tmp_path, monkeypatch, flags, expected):
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbogomips\t: 4000\n")
    monkeypatch.setattr(quickstart, "CPUINFO", cpuinfo)
    monkeypatch.delenv("JAX_DEFAULT_MATMUL_PRECISION", raising=False)
    assert quickstart.matmul_precision() == expected
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    assert quickstart.matmul_precision() == "highest"


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not a quickstart run"):
        quickstart.run_chain(tmp_path / "mine", tmp_path / "samples", "smoke", fresh=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("size", ["smoke", "default", "full"])
def test_the_plan_is_whole(tmp_path, monkeypatch, size):
    monkeypatch.setattr(quickstart.samples_lib, "asset", lambda folder, name: folder / name)
    steps = quickstart.plan(tmp_path / "run", tmp_path / "samples", size, seed=3)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for position, step in enumerate(steps):
        assert set(step.after) <= {"samples", *names[:position]}, step.name
    assert [name for name in names if name in quickstart.STAGES] == list(quickstart.STAGES)
    evaluations = sum(name.startswith("eval_") for name in names)
    assert names[-1] == "report" and evaluations == (2 if size == "default" else 3)


def test_annotations_of_another_decoder_are_removed(tmp_path, monkeypatch):
    store = tmp_path / "annotations"
    step = quickstart.Step("annotate_pneumonia", ("-m", "x"), store, resumable=True)
    with AnnotationWriter(store) as writer:
        writer.write(Annotation("a" * 64, "PNEUMONIA", probabilities={"pneumonia": 0.5}))
    quickstart._remove(step)
    assert len(AnnotationStore(store)) == 1  # several experts share it
    monkeypatch.setattr("vilam3_jax.data.experts.index.DECODER_VERSION", 0)
    quickstart._remove(step)
    assert not store.exists()
