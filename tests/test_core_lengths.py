"""Budgets over a distribution of lengths: exact, kept, and interpolated between the lengths that were probed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_tiny import MAX_POSITIONS, tiny_model, tiny_rows
from test_core_search import random_scores, toy_groups
from test_probe import table

from deploy_prune.archs import check_config
from deploy_prune.costs import EXACT, Budget, encoder_flops, flops_table, latency_table, unit_flops
from deploy_prune.errors import InputError
from deploy_prune.heads import Head
from deploy_prune.latency_table import LatencyTable, LatencyTables
from deploy_prune.lengths import Lengths, kept_line, lengths_line
from deploy_prune.pruner import prune_rows
from deploy_prune.runtime_bench.flops import count_torch
from deploy_prune.search import Minimum, search
from deploy_prune.slicing import slice_model
from deploy_prune.stages import Options
from deploy_prune.units import SlicePlan

MODEL = tiny_model("bert")
GROUPS = check_config(MODEL.config).groups(MODEL)
ROWS = st.lists(st.integers(1, MAX_POSITIONS), min_size=8, max_size=40)


def counted(model: Any, tokens: int) -> int:
    """Count the FLOPs of a model that runs on one row."""
    return count_torch(model, {name: torch.ones(1, tokens, dtype=torch.long) for name in ("input_ids",)})


DENSE = {tokens: counted(MODEL, tokens) for tokens in range(1, MAX_POSITIONS + 1)}


@given(lengths=ROWS, batch=st.integers(1, 8), seed=st.integers(0, 50))
def test_rows_meet_in_batches_and_run_at_the_longest(lengths: list[int], batch: int, seed: int) -> None:
    found = Lengths.of_rows(lengths, batch, seed)
    order = np.random.default_rng(seed).permutation(len(lengths)) if batch > 1 else range(len(lengths))
    met = [lengths[i] for i in order]
    runs = [met[i : i + batch] for i in range(0, len(met) - batch + 1, batch)]
    assert dict(found.rows) == Counter(max(run) for run in runs for _ in run)
    assert found.total == len(lengths) // batch * batch
    assert found == Lengths.of_rows(lengths, batch, seed)
    assert found.mean >= np.mean([n for run in runs for n in run])
    entry = found.entry()
    assert entry["quantiles"]["min"] <= entry["quantiles"]["median"] <= entry["quantiles"]["max"]
    assert sum(rows for _, rows in entry["counts"]) == entry["rows"]


@settings(max_examples=12, deadline=None)
@given(lengths=ROWS, keep=st.floats(0.25, 1.0), batch=st.sampled_from([1, 4]), seed=st.integers(0, 1000))
def test_the_cost_is_the_sum_of_what_the_sliced_model_computes(
    lengths: list[int], keep: float, batch: int, seed: int
) -> None:
    """Row by row, each at the length of its batch, counted on the module that runs."""
    over = Lengths.of_rows(lengths, batch, seed)
    (limit,) = Budget(keep).limits(GROUPS, over, 0)
    found = search(GROUPS, random_scores(GROUPS, seed), [limit], Minimum())
    plan = SlicePlan.from_masks(GROUPS, found.masks)
    sliced = slice_model(MODEL, GROUPS, plan)
    saved = sum(rows * (DENSE[tokens] - counted(sliced, tokens)) for tokens, rows in over.rows)
    assert saved == limit.table.dense - found.costs["flops"]
    assert found.costs["flops"] == encoder_flops(GROUPS, over, plan) <= keep * encoder_flops(GROUPS, over)
    assert limit.table.dense == sum(g.size * unit_flops(g, n) * rows for g in GROUPS for n, rows in over.rows)


def test_the_share_is_not_that_at_the_mean_length() -> None:
    """Attention is quadratic: long rows weigh more, and a plan that cuts heads keeps less than at the mean."""
    over = Lengths.of_rows([2] * 30 + [48] * 10)
    masks = {g.name: np.r_[np.ones(1), np.zeros(g.size - 1)] if g.kind == "head" else np.ones(g.size) for g in GROUPS}
    plan = SlicePlan.from_masks(GROUPS, masks)  # type: ignore[arg-type]

    def kept(lengths: int | Lengths) -> float:
        return encoder_flops(GROUPS, lengths, plan) / encoder_flops(GROUPS, lengths)

    assert over.seq_len == 14
    assert kept(48) < kept(over) < kept(14) - 0.01 < kept(2)
    single = Lengths.one(14)
    assert encoder_flops(GROUPS, single) == encoder_flops(GROUPS, 14) == flops_table(GROUPS, 14).dense


def test_more_than_can_be_counted_is_refused() -> None:
    group = toy_groups()[0]
    rows = EXACT // unit_flops(group, 8)
    with pytest.raises(InputError, match="too many to count"):
        flops_table(toy_groups(), Lengths(((8, rows),), data=True))


def at(seq: int, factor: float, batch: int = 1) -> LatencyTable:
    """Return the table of test_probe with all times scaled."""
    whole = table(seq=seq, batch=batch, base_ms=factor, dense_ms=11 * factor)
    kinds = {
        name: k | {key: [factor * ms for ms in k[key]] for key in ("ms", "low_ms", "high_ms")}
        for name, k in whole["kinds"].items()
    }
    return LatencyTable.model_validate(whole | {"kinds": kinds})


def test_latency_is_interpolated_between_probed_lengths() -> None:
    groups = toy_groups()
    tables = LatencyTables.of([at(20, 5.0), at(10, 2.0)])
    for tokens, factor in ((10, 2.0), (12, 2.6), (20, 5.0)):
        costs = latency_table(groups, tables, Lengths.one(tokens))
        assert costs.dense == pytest.approx(11 * factor)
        assert costs.groups["L01.neurons"] == pytest.approx(factor * np.array([0.0, 1.0, 2.0, 2.5, 3.0]))
    over = Lengths.of_rows([10, 10, 12, 20])
    mean = latency_table(groups, tables, over)
    assert mean.dense == pytest.approx(11 * (2 + 2 + 2.6 + 5) / 4)
    (limit,) = Budget(keep_latency=0.5, lut=tables, lengths="data").limits(groups, over, 0)
    found = search(groups, random_scores(groups, 0), [limit], Minimum())
    assert found.costs["latency"] <= 0.5 * mean.dense
    single = latency_table(groups, at(10, 2.0), Lengths.one(37))  # a table of one shape stands for every length
    assert single.dense == pytest.approx(22)


@pytest.mark.parametrize(
    ("tables", "lengths", "said"),
    [
        ([(10, 1), (20, 1)], Lengths.one(9), "for length 9, the latency table was probed from 10 to 20 tokens"),
        ([(10, 1), (20, 1)], Lengths.of_rows([12, 21]), "for lengths from 12 to 21"),
        ([(10, 1)], Lengths.of_rows([10, 11]), "probed at 10 tokens alone"),
        ([(10, 1), (20, 1)], Lengths.of_rows([12, 14], 2), "batches of 2, the latency table was probed at 1"),
        ([(10, 1), (10, 8)], Lengths(((10, 1),), 4), "batches of 4, the latency table was probed at 1, 8"),
    ],
)
def test_what_was_not_probed_is_refused(tables: list[tuple[int, int]], lengths: Lengths, said: str) -> None:
    with pytest.raises(InputError, match=said):
        latency_table(toy_groups(), LatencyTables.of([at(n, 1.0, b) for n, b in tables]), lengths)


def test_a_table_of_one_shape_is_refused_for_the_data() -> None:
    with pytest.raises(InputError, match="probed at 10 tokens alone"):
        latency_table(toy_groups(), at(10, 1.0), Lengths.of_rows([9, 10]))
    assert latency_table(toy_groups(), at(10, 1.0), Lengths.of_rows([10, 10])).dense == pytest.approx(11)
    with pytest.raises(InputError, match="batches of 8"):
        latency_table(toy_groups(), at(10, 1.0), Lengths(((10, 1),), 8))
    with pytest.raises(InputError, match="several lengths"):
        latency_table(toy_groups(), LatencyTables.of([at(10, 1.0), at(20, 1.0)]))


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ([at(10, 1.0), at(10, 2.0)], "each named once"),
        ([at(10, 1.0), at(20, 1.0).model_copy(update={"layers": 3})], "different models"),
        ([], "at least 1"),
    ],
)
def test_tables_that_do_not_go_together_are_refused(tables: list[LatencyTable], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LatencyTables.of(tables)


def test_budgets_that_have_no_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="neither 'one' nor 'data'"):
        Budget(lengths="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has no seq_len"):
        Budget(seq_len=8, lengths="data")
    with pytest.raises(InputError, match="not a number of rows"):
        Budget(lengths="data", lengths_batch=0)
    with pytest.raises(InputError, match="fill no batch of 9"):
        Budget(lengths="data", lengths_batch=9).lengths_over(tiny_rows(8))
    with pytest.raises(InputError, match="Images are all of one length"):
        Budget(lengths="data").lengths_over(tiny_rows(8, family="vit"))


def test_pruning_keeps_to_the_rows_own_lengths() -> None:
    rows = tiny_rows(64, seed=3)
    options = Options(criterion="random", compensate="none", rearrange="none", seed=4)
    made = prune_rows(
        MODEL, Head("classification"), rows, Budget(0.5, lengths="data", lengths_batch=5), options=options
    )
    over = Lengths.of_rows([r.length for r in rows], 5, seed=4)
    assert made.lengths == over
    assert made.seq_len == over.seq_len
    (limit,) = made.limits
    assert limit["dense"] == encoder_flops(GROUPS, over)
    assert limit["reached"] == encoder_flops(GROUPS, over, made.plan) <= limit["limit"] <= limit["dense"] / 2
    said = lengths_line(over.entry())
    assert said.startswith("the lengths of 60 rows in batches of 5, each padded to its longest: mean ")
    assert kept_line({"all": 0.5, "at": [{"tokens": 3, "share": 0.625}]}).endswith(
        "50.0% over all of them, 62.5% at 3 tokens"
    )
