"""The queue before a model: what shares a run, what is refused, and that no request spoils another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deploy_prune.server.batching import Arrays, Batcher, Merging
from deploy_prune.server.errors import BusyError

Run = Callable[[Arrays], Arrays]


class Model:
    """Add one to each token, and remember the shapes it was run on; ids of 13 break it."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.seconds = seconds

    def __call__(self, feeds: Arrays) -> Arrays:
        import time

        time.sleep(self.seconds)
        ids = feeds["input_ids"]
        self.shapes.append(ids.shape)
        if (ids == 13).any():
            raise RuntimeError("thirteen")
        return {"logits": ids + 1, "sums": (ids * feeds["attention_mask"]).sum(1)}


def text(rows: int, tokens: int, value: int = 1) -> Arrays:
    ids = np.full((rows, tokens), value)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def together(model: Run, requests: list[Arrays], merging: Merging | None = None, **how: Any) -> list[Any]:
    """Ask all at once; return answers and errors."""

    async def main() -> list[Any]:
        merging_ = merging or Merging({"input_ids": 9}, frozenset({"logits"}))
        batcher = Batcher(model, merging_, **{"wait": 0.05, **how})
        found = await asyncio.gather(*[batcher.infer(r) for r in requests], return_exceptions=True)
        await batcher.close()
        return found

    return asyncio.run(main())


def test_texts_are_padded_to_the_longest_and_cut_again() -> None:
    model = Model()
    found = together(model, [text(1, 8, 2), text(2, 7, 3), text(1, 8, 4)])
    assert model.shapes == [(4, 8)]
    assert [f["logits"].shape for f in found] == [(1, 8), (2, 7), (1, 8)]
    assert [f["sums"].tolist() for f in found] == [[16], [21, 21], [32]]


def test_what_would_be_mostly_padding_runs_alone() -> None:
    model = Model()
    together(model, [text(1, 4), text(1, 64), text(1, 5)])
    assert sorted(model.shapes) == [(1, 64), (2, 5)]


def test_a_run_has_no_more_rows_than_allowed() -> None:
    model = Model()
    together(model, [text(1, 4)] * 5, most_rows=2)
    assert max(shape[0] for shape in model.shapes) == 2
    assert sum(shape[0] for shape in model.shapes) == 5


def test_images_of_another_shape_run_alone() -> None:
    shapes: list[tuple[int, ...]] = []

    def model(feeds: Arrays) -> Arrays:
        shapes.append(feeds["pixel_values"].shape)
        return {"logits": feeds["pixel_values"].mean((1, 2, 3))}

    images = [{"pixel_values": np.zeros((1, 3, size, size), np.float32)} for size in (4, 8, 4)]
    together(model, images, Merging())
    assert sorted(shapes) == [(1, 3, 8, 8), (2, 3, 4, 4)]


def test_one_request_does_not_spoil_the_others() -> None:
    found = together(Model(), [text(1, 4), text(1, 4, 13), text(1, 4, 5)])
    assert [type(f) for f in found] == [dict, RuntimeError, dict]
    assert found[2]["sums"].tolist() == [20]


def test_a_full_queue_is_refused_and_the_rest_is_answered() -> None:
    found = together(Model(0.05), [text(1, 4)] * 6, queue_rows=3, most_rows=1, wait=0.0)
    busy = [f for f in found if isinstance(f, BusyError)]
    assert 0 < len(busy) < 6
    assert all(isinstance(f, dict) for f in found if f not in busy)


def test_who_goes_away_is_not_run() -> None:
    model = Model(0.05)

    async def main() -> None:
        batcher = Batcher(model, Merging({"input_ids": 0}), most_rows=1)
        first = asyncio.create_task(batcher.infer(text(1, 4)))
        second = asyncio.create_task(batcher.infer(text(1, 5)))
        third = asyncio.create_task(batcher.infer(text(1, 6)))
        await asyncio.sleep(0.01)
        second.cancel()
        await first
        await third
        await batcher.close()

    asyncio.run(main())
    assert model.shapes == [(1, 4), (1, 6)]


def test_closing_answers_what_waits_and_takes_no_more() -> None:
    async def main() -> list[Any]:
        batcher = Batcher(Model(0.02), Merging({"input_ids": 0}), most_rows=1)
        asked = [asyncio.create_task(batcher.infer(text(1, 4))) for _ in range(3)]
        await asyncio.sleep(0.01)
        await batcher.close()
        with pytest.raises(BusyError):
            await batcher.infer(text(1, 4))
        return [t.result() for t in asked]

    assert len(asyncio.run(main())) == 3
