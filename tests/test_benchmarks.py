"""The benchmarks' own tools: cells that can be gone on with, what is counted, and that every row runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import duge_lite as duge

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch):
    """The scripts, as they see each other."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import common
    import continual
    import gpu
    import recovery
    import single

    return {m.__name__: m for m in (common, continual, gpu, recovery, single)}


def test_cells_are_kept_and_read_anew_by_another_judge(bench, tmp_path, monkeypatch):
    common, path = bench["common"], tmp_path / "x.jsonl"
    cells = common.Cells(path)
    cells.add(("ours", "apple", 0), {"cpu": 1.5}, np.full((2, 4, 4, 3), 7, np.uint8))
    assert ("ours", "apple", 0) in common.Cells(path) and ("ours", "apple", 1) not in cells

    calls = []

    def read(key: tuple, pictures: np.ndarray) -> dict:
        calls.append(key)
        return {"mean": float(pictures.mean())}

    for judge, count in (("a", 1), ("a", 1), ("b", 2)):
        monkeypatch.setattr(common, "judge_id", lambda judge=judge: judge)
        (cell,) = cells.read(read)
        assert (cell["mean"], cell["cpu"], cell["judge"], len(calls)) == (7, 1.5, judge, count)
    monkeypatch.setattr(common, "model", lambda: "another")
    assert ("ours", "apple", 0) not in cells


def test_orders_ask_for_the_same(bench):
    continual = bench["continual"]
    for world, names in continual.WORLDS.items():
        orders = [continual.order(world, i) for i in range(continual.ORDERS)]
        assert len(set(orders)) == continual.ORDERS and all(set(o) == set(names) for o in orders)
    assert len(continual.TWELVE) == 12 and len(set(continual.SIXTEEN)) == 16


def test_no_baseline_gets_what_is_ours(bench):
    for name, method in bench["common"].methods().items():
        if method.slow and method.objective is not duge.gradient.DUGE:
            assert method.config.weights[2] == method.config.revisit == 0
            assert method.config.weights[1] == (1.0 if "prior" in name or "nearest" in name else 0.0)


@pytest.mark.slow
def test_every_row_forgets_two_and_is_undone(bench, tiny_pipe):
    before = {n: p.detach().clone() for n, p in tiny_pipe.unet.named_parameters()}
    short = {"iterations": 1, "lessons": 2, "target_size": 2, "memory_size": 4, "num_inference_steps": 1}
    for name, method in bench["common"].methods().items():
        if name in ("base", "oracle") or name.startswith("  ") or "prior" in name or "0.1" in name:
            continue  # nothing done, or the same with another number
        if method.config is not None:
            method = replace(method, config=replace(method.config, **short))
        runs = [method.forget(tiny_pipe, "apple", 0), method.forget(tiny_pipe, "neon", 0, ("apple",))]
        now = dict(tiny_pipe.unet.named_parameters())
        assert any(not torch.equal(now[n], before[n]) for n in before), name
        for run in reversed(runs):
            run.restore()
        assert all(torch.equal(now[n], before[n]) for n in before), name


def test_bystanders_do_not_name_what_went(bench, tiny_pipe):
    recovery, card = bench["recovery"], duge.model_card(tiny_pipe)
    rows = recovery.bystanders(card, "apple")
    assert not rows.prompt.str.contains("apple").any() and not (rows["object"] == rows.other)[:57].any()
    assert rows.groupby("group", sort=False).size().to_dict() == {
        "two objects": 19, "on a background": 38, "alone": 95
    }  # fmt: skip
    assert rows.prompt[0] == "a photo of an orange next to a bow tie"
    assert rows.prompt[19] == "a photo of an orange on a white background"
    assert not rows.duplicated(["prompt", "seed"]).any()


@pytest.mark.slow
def test_every_probe_has_its_cell_and_row(bench, tiny_pipe, tiny_judge, tmp_path, monkeypatch):
    recovery, common = bench["recovery"], bench["common"]
    short = {"steps": 1, "batch_size": 2}
    for name in ("invert_steps", "search_steps"):
        own = getattr(recovery.attacks, name)
        monkeypatch.setattr(recovery.attacks, name, lambda *a, own=own, **how: own(*a, **how, **short))
    monkeypatch.setattr(recovery, "STEPS", 6)
    monkeypatch.setattr(
        recovery, "draw", lambda pipe, texts, seeds: np.zeros((len(texts), 64, 64, 3), np.uint8)
    )
    monkeypatch.setattr(recovery.duge.Judge, "load", lambda *_: tiny_judge)
    cells = common.Cells(tmp_path / "x.jsonl")
    for name in ("base", "oracle"):
        for probe, function in recovery.PROBES.items():
            if probe != "relearn":  # forty steps
                recovery.attack(
                    cells,
                    ("apple", name, 0, probe),
                    function,
                    recovery.Attacked(tiny_pipe, tiny_pipe, "apple", 0),
                )
    reader = recovery.Reader()
    lines = cells.read(reader)
    recovery.brought_back([c for c in lines if c["key"][3] != "elsewhere"], "apple", tmp_path / "a.csv")
    recovery.what_broke(cells, lines, "apple", reader, tmp_path / "b.csv")
    table = pd.read_csv(tmp_path / "a.csv", index_col=0)
    assert len(table) == 14 and list(table.columns) == ["base", "oracle"] and table.notna().all(axis=None)
    assert table.base["learned word"].endswith("n=20)") and table.base["its noise found (DDIM)"].endswith(
        "n=10)"
    )
    broke = pd.read_csv(tmp_path / "b.csv", index_col=0)
    assert list(broke.index) == ["base", "oracle"] and broke["two objects"].str.endswith("n=19)").all()
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


def test_a_learned_word_counts_from_old_cells_and_new(bench, tmp_path, monkeypatch):
    common, single = bench["common"], bench["single"]
    monkeypatch.setattr(single, "RESULTS", tmp_path)
    cells, judged = common.Cells(tmp_path / "recovery.jsonl"), {"judge": common.judge_id()}
    cells.add(("apple", "UCE", 1, "word"), {"seen": [1, 0, 0, 1], **judged})
    cells.add(("apple", "UCE", 0, "name"), {"seen": [1], **judged})
    cells.add(("apple", "UCE", 2, "word"), {"seen": [1], "judge": "another"})
    old = [{"key": ["inversion", "UCE", 0], "seen": 0.9, **judged}]
    assert single.learned_words(old) == {"UCE": {0: 0.9, 1: 0.5}}


def test_bytes_are_counted_while_they_live(bench):
    before = torch.zeros(1000)  # 4000 bytes, made outside
    with bench["gpu"].Tally() as tally:
        a = torch.zeros(1000)
        view = a[:500].reshape(5, 100)
        b = a + before  # here nothing of `before` is counted
        del a
        assert (tally.now, tally.peak) == (8000, 8000)  # the view holds it
        del view
        assert tally.now == 4000
        b.square().sum()
    assert tally.peak == 8004
