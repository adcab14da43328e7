"""How full groups are: the shipped settings on the published mixture, and `vilam3 data stats`."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from data_worlds import build, config, film, report, tokenizer, write
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax import config as config_lib
from vilam3_jax.data import main as data_main
from vilam3_jax.data.packing import LOOKAHEAD
from vilam3_jax.data.stats import Size, measure_fill, recommend
from vilam3_jax.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def packing_benchmark():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("packing_benchmark", BENCHMARKS / "packing.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("size", ["3b", "8b", "13b", "40b"])
@pytest.mark.parametrize("stage", ["stage2a_align", "stage2b_pretrain", "stage3_instruct", "stage4_expert"])
def test_shipped_settings_meet_the_targets(packing_benchmark, stage: str, size: str) -> None:
    cfg = config_lib.load(f"configs/{stage}.py:vila_m3_{size}")
    mixture = dict(packing_benchmark.RECIPES)[f"configs/{stage}.py"]
    shards = packing_benchmark.shards_of(cfg, mixture, samples=3000, seed=3)
    fill = measure_fill(shards, cfg.data.seq_len, cfg.data.rows_per_group, cfg.data.images_per_group)
    assert fill.tokens >= 0.97 and fill.slots >= 0.95, fill
    assert 0 < fill.longest_wait <= LOOKAHEAD
    # One slot too few and one in four too many are seen.
    worse = measure_fill(shards, cfg.data.seq_len, 2, cfg.data.images_per_group * 5 // 4)
    assert worse.slots < 0.95


def test_the_corpus_has_the_published_counts(packing_benchmark) -> None:
    corpus = sys.modules["corpus"]
    assert sum(corpus.MIXTURES["expert"].values()) == 1_840_428
    drawn = list(corpus.stream("expert", "llama_3", 196, count=20_000))
    assert {images for _, _, images in drawn} == {0, 1, 2, 5}
    share = np.mean([name.startswith("vista3d") for name, _, _ in drawn])
    assert share == pytest.approx(400_000 / 1_840_428, abs=0.001)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 0, 1, 1, 2, 5])), min_size=300, max_size=400),
    st.integers(0, 60),
)
def test_stretches_of_one_kind_starve_nobody(drawn: list[tuple[int, int]], stretch: int) -> None:
    few = [Size(t, 0) for t, _ in drawn[:stretch]] + [Size(40, 5) for _ in range(stretch)]
    sizes = few + [Size(t + 2 * m, m) for t, m in drawn]
    fill = measure_fill([sizes], seq_len=64, rows=2, images=5, lookahead=16)
    assert fill.longest_wait <= 128  # positions of two rows: as many may wait if they have one token each


def test_recommended_slots_leave_the_least_empty() -> None:
    rng = np.random.default_rng(0)
    shards = [
        [Size(int(rng.integers(20, 90)), int(rng.integers(0, 3))) for _ in range(600)] for _ in range(2)
    ]
    best = recommend(shards, seq_len=256)
    assert [fill.rows for fill in best] == [1, 2, 4, 8]
    for fill in best[1:]:
        assert fill.tokens > 0.97 and fill.slots > 0.95, fill
        for other in (fill.images - 2, fill.images + 2):
            if other > 0:
                assert measure_fill(shards, 256, fill.rows, other).shortfall > fill.shortfall
    with pytest.raises(UserError, match="too few samples"):
        recommend([[Size(5, 0)]], seq_len=256)


def test_data_stats_names_the_group_sizes(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    write(tmp_path / "films", [film(i, rng) for i in range(30)])
    write(tmp_path / "reports", [report(i, rng) for i in range(30)])
    tokenizer().save(tmp_path / "tokenizer")
    argv = [
        "stats",
        "--samples=400",
        "--config=configs/stage3_instruct.py:tiny",
        f"--config.data.path={tmp_path}",
        '--config.data.mixture=(("films",1.0),("reports",1.0))',
        f"--config.model.tokenizer={tmp_path / 'tokenizer'}",
        "--config.data.seq_len=256",
    ]
    assert data_main.main(argv) == 0
    out = capsys.readouterr().out
    assert "400 samples, 0 skipped" in out
    assert re.search(r"images of a sample: 0\.[45]\d on average; 0: \d+\.\d%, 1: \d+\.\d%\n", out), out
    assert "now:" in out and "take:" in out and "data.images_per_group=" in out
    with pytest.raises(UserError, match="pairs are not packed"):
        data_main.main(["stats", "--config=configs/stage1_vision.py:tiny"])


def test_sizes_are_found_without_reading_an_image(tmp_path, monkeypatch) -> None:
    from vilam3_jax.data.render import ImageReader

    def refuse(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr(ImageReader, "read", refuse)
    rng = np.random.default_rng(0)
    write(tmp_path / "films", [film(i, rng) for i in range(10)])
    loader = build(config(tmp_path))
    sizes = loader.sizes(20)
    loader.close()
    assert [len(shard) for shard in sizes] == [20] and all(size.num_images == 1 for size in sizes[0])
