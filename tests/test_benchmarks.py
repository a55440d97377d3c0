"""The benchmarks' own tools: cells that can be gone on with, what is counted, and that every row runs."""

import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import changed, weights

import duge_lite as duge

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """The scripts, as they see each other; they write elsewhere."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scripts = {n: import_module(n) for n in ("common", "continual", "gpu", "recovery", "single")}
    monkeypatch.setattr(scripts["common"], "RESULTS", tmp_path)
    return SimpleNamespace(**scripts)


def test_cells_are_kept_and_read_anew_by_another_judge(bench, monkeypatch):
    common, key, calls = bench.common, ("ours", "apple", 0), []

    class Mean(common.Cells):
        def cell(self, *key: object) -> tuple[dict, np.ndarray]:
            calls.append(key)
            return {"cpu": 1.5}, np.full((2, 4, 4, 3), 7, np.uint8)

        def measure(self, key: tuple, pictures: np.ndarray) -> dict:
            calls.append("judge")
            return {"mean": float(pictures.mean())}

    for _ in range(2):
        Mean("x").fill(key)
    for judge in "aab":
        monkeypatch.setattr(common, "JUDGE", judge)
        (cell,) = Mean("x").read()
        assert (cell["mean"], cell["cpu"], cell["judge"]) == (7, 1.5, judge) and cell["seconds"] >= 0
    assert calls == [key, "judge", "judge"]
    Mean("x").file(key).unlink()
    Mean("x").fill(key)
    Mean("x").fill(key, shown=True)
    assert calls[3:] == [key]
    monkeypatch.setattr(common, "model", lambda key: "another")
    assert not Mean("x").lines()


def test_an_oracles_cells_are_drawn_anew_when_its_weights_change(bench, monkeypatch):
    common, cells = bench.common, bench.common.Cells("x")
    for key in (("ours", "apple", 0), ("oracle", "apple", 0), ("12 requests", "oracle", 0)):
        cells.add(key, {})
    monkeypatch.setattr(common, "digest", lambda *f, own=common.digest: own(*f) + ("!" if len(f) > 1 else ""))
    assert [*cells.lines()] == [("ours", "apple", 0)]


@pytest.mark.slow
def test_the_committed_tables_are_what_the_committed_cells_say(bench, tmp_path):
    for path in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    for script in (bench.single.Single, bench.single.Sweep, bench.continual.Continual):
        script(script.__name__.lower()).summarise()
    recovery = bench.recovery.Recovery("recovery")
    recovery.brought_back([c for c in recovery.read() if c["key"][3] != "elsewhere"])
    for path in tmp_path.glob("*.csv"):
        assert path.read_bytes() == (ROOT / "benchmarks" / "results" / path.name).read_bytes(), path.name
    assert {path.stem for path in tmp_path.glob("*.csv")} == {"single", "sweep", "continual", "recovery"}


def test_no_baseline_gets_what_is_ours(bench):
    for name, method in bench.common.METHODS.items():
        if method.slow and method.objective is not duge.gradient.DUGE:
            assert method.config.weights[2] == method.config.revisit == 0
            assert method.config.weights[1] == (1.0 if "prior" in name or "nearest" in name else 0.0)


@pytest.mark.slow
def test_every_row_forgets_two_and_is_undone(bench, tiny_pipe):
    before = weights(tiny_pipe)
    short = {"iterations": 1, "lessons": 2, "target_size": 2, "memory_size": 4, "num_inference_steps": 1}
    for name, method in bench.common.METHODS.items():
        if name in ("base", "oracle") or name.startswith("  ") or "prior" in name or "0.1" in name:
            continue  # nothing done, or the same with another number
        if method.config is not None:
            method = replace(method, config=replace(method.config, **short))
        runs = [method.forget(tiny_pipe, "apple", 0), method.forget(tiny_pipe, "neon", 0)]
        assert changed(tiny_pipe, before), name
        for run in reversed(runs):
            run.restore()
        assert not changed(tiny_pipe, before), name


def test_bystanders_do_not_name_what_went(bench, tiny_pipe):
    rows = bench.recovery.bystanders(duge.model_card(tiny_pipe))
    assert not rows.prompt.str.contains("apple").any() and not (rows["object"] == rows.other)[:57].any()
    assert rows.group.value_counts().to_dict() == {"alone": 95, "on a background": 38, "two objects": 19}
    assert rows.prompt[0] == "a photo of an orange next to a bow tie"
    assert rows.prompt[19] == "a photo of an orange on a white background"
    assert not rows.duplicated(["prompt", "seed"]).any()


@pytest.mark.slow
def test_every_probe_has_its_cell_and_row(bench, tiny_pipe, tiny_judge, tmp_path, monkeypatch):
    recovery, short = bench.recovery, {"steps": 1, "batch_size": 2}
    for name in ("invert_steps", "search_steps"):
        own = getattr(recovery.attacks, name)
        monkeypatch.setattr(recovery.attacks, name, lambda *a, own=own, **how: own(*a, **how, **short))
    monkeypatch.setattr(recovery, "STEPS", 6)
    for module in (recovery, bench.common):
        monkeypatch.setattr(module, "draw", lambda _, texts, __: np.zeros((len(texts), 64, 64, 3), np.uint8))
    monkeypatch.setattr(duge.Judge, "load", lambda *_: tiny_judge)
    monkeypatch.setattr(duge, "load_pipeline", lambda: tiny_pipe)
    monkeypatch.setattr(duge, "load_oracle", lambda pipe, _: pipe)
    monkeypatch.setattr(recovery, "TURNS", 1)
    quick = [p for p in recovery.PROBES if p not in ("relearn", "after twelve")]  # forty steps
    monkeypatch.setattr(recovery, "PROBES", quick)
    cells = recovery.Recovery("recovery")
    cells.run(["base", "oracle"])
    lines = cells.read()
    cells.brought_back([c for c in lines if c["key"][3] != "elsewhere"])
    cells.what_broke([c for c in lines if c["key"][3] == "elsewhere"])
    table, broke = (pd.read_csv(tmp_path / f"{n}.csv", index_col=0) for n in ("recovery", "bystanders"))
    assert len(table) == 14 and list(table.columns) == ["base", "oracle"] and table.notna().all(axis=None)
    assert list(table.base[["learned word", "its noise found (DDIM)"]].str[-5:]) == ["n=20)", "n=10)"]
    assert list(broke.index) == ["base", "oracle"] and broke["two objects"].str.endswith("n=19)").all()
    assert (tmp_path / "recovery.png").exists() and (tmp_path / "bystanders.png").exists()


def test_bytes_are_counted_while_they_live(bench):
    before = torch.zeros(1000)  # 4000 bytes, made outside
    with bench.gpu.Tally() as tally:
        a = torch.zeros(1000)
        view = a[:500].reshape(5, 100)
        b = a + before  # here nothing of `before` is counted
        del a
        assert (tally.now, tally.peak) == (8000, 8000)  # the view holds it
        del view
        assert tally.now == 4000
        b.square().sum()
    assert tally.peak == 8004
