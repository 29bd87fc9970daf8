"""One dense model with its data: prune it in many ways, compare each with the dense one on the whole split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ..calibration import sample_indices
from ..checkpoint import input_signature, load_config, load_dense
from ..config import Augment
from ..costs import Budget, counts_of
from ..depth import Depth, choose, without
from ..errors import InputError
from ..fidelity import fidelity
from ..heads import Head
from ..latency_table import ChannelLatency, LatencyTable, LatencyTables, read_latency_table
from ..measuring import Candidate, time_models
from ..predict import predict
from ..progress import Reporter, Silent
from ..pruner import Pruner, pruner_of
from ..recover import Recovery, recover
from ..runtime_bench.bench import Place
from ..runtime_bench.machine import default_threads, describe_machine
from ..runtime_bench.stats import Ratio
from ..stages import Options, PrunedPlan, resolve_device
from ..tasks import check_task, load_task, task_head
from ..tasks.base import Row, RowOutput
from ..units import MaskSet, SlicePlan


@dataclass(frozen=True)
class Setting:
    """Say what an experiment runs on, and over which budgets and seeds."""

    model: str
    task: str
    data: str | None = None
    keeps: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    samples: int = 2048
    max_length: int | None = None
    text_column: str | None = None
    label_column: str | None = None
    device: str = "auto"
    runtime: str = "ort-cpu"
    batch: int = 1
    seq: int | None = None  # of latency measurements; the calibration rows' mean length by default
    threads: int | None = None
    lut: str | None = None  # a latency table of this model
    rival: str | None = None  # another dense checkpoint, fine-tuned on the same task
    recover_epochs: float = 3.0
    recover_lr: tuple[float, ...] = (1e-5,)  # each is tried
    recover_samples: int = 16_384  # training rows, of which a part is held out
    recover_batch: int = 32
    recover_augment: tuple[Augment, ...] = ("none",)  # likewise
    recover_depth: int = 0  # sub-layers left out of the recovered model, which is then recovered again


class Lab:
    """Hold the model, its evaluation split and the dense outputs on it."""

    def __init__(self, setting: Setting, reporter: Reporter | None = None) -> None:
        self.setting, self.reporter = setting, reporter or Silent()
        source = str(Path(setting.model).resolve()) if Path(setting.model).is_dir() else setting.model
        check_task(setting.task, load_config(source))
        self.head = Head(task_head(setting.task))
        self.checkpoint = dense = load_dense(source, self.head.kind)
        self.device = resolve_device(setting.device)
        self.model, self.processor = dense.model.to(self.device), dense.processor
        self.checkpoint, self.pad_id = dense, dense.pad_id
        self.data = load_task(
            setting.task,
            **dense.preparing,
            config=dense.config,
            data=setting.data,
            max_length=setting.max_length,
            text_column=setting.text_column,
            label_column=setting.label_column,
        )
        self._pruner: tuple[Any, Pruner] | None = None

    @cached_property
    def rows(self) -> list[Row]:
        """Return the evaluation rows, decoded once: every cell reads them again."""
        return [Row(dict(row.features), row.label, row.tokens) for row in self.data.evaluation.rows()]

    @cached_property
    def dense(self) -> list[RowOutput]:
        """Return the dense model's outputs on the evaluation rows."""
        return predict(self.model, self.head, self.rows, pad_id=self.pad_id)

    @cached_property
    def dense_row(self) -> dict[str, Any]:
        """Return the dense model's quality."""
        score = self.data.evaluation.score(self.dense, self.dense)
        return {"metric": self.data.metric, "value": score.get(self.data.metric or "")}

    def pruner(self, seed: int, samples: int | None = None) -> Pruner:
        """Return the pruner on a seed's calibration rows; the last one is kept, with what it has computed."""
        key = (seed, samples or self.setting.samples)
        if self._pruner is None or self._pruner[0] != key:
            train = self.data.train
            drawn = train.encode(sample_indices(len(train), key[1], seed))
            rows = [Row(dict(row.features), row.label, row.tokens) for row in drawn]
            kind = pruner_of(self.model)
            self._pruner = key, kind(self.model, self.head, rows, pad_id=self.pad_id, reporter=self.reporter)
        return self._pruner[1]

    def prune(
        self, keep: float | Budget, seed: int, options: Options, *, samples: int | None = None
    ) -> tuple[PrunedPlan, nn.Module]:
        """Return the plan and the sliced model."""
        budget = keep if isinstance(keep, Budget) else Budget(keep)
        found = self.pruner(seed, samples).prune(budget, options)
        return found, found.slice()

    def recover(self, student: nn.Module, seed: int, lr: float, augment: Augment) -> dict[str, Any]:
        """Distil a sliced model in place on the training split; return the record."""
        setting, train = self.setting, self.data.train
        return recover(
            student.to(self.device),
            self.model,
            self.head,
            train.encode(sample_indices(len(train), setting.recover_samples, seed)),
            Recovery(
                epochs=setting.recover_epochs,
                lr=lr,
                batch_rows=setting.recover_batch,
                augment=augment,
                seed=seed,
            ),
            pad_id=self.pad_id,
        )

    def shorten(self, found: PrunedPlan, student: nn.Module, seed: int, sublayers: int) -> tuple[PrunedPlan, nn.Module]:
        """Leave sub-layers out of a sliced model, as `--depth-order after` does; return its plan and the model."""
        whole = [g for g in found.groups if found.plan[g.name].count]
        rows = self.pruner(seed).rows
        depth = Depth(sublayers=sublayers)
        left_out = choose(student, whole, self.head, rows, depth, teacher=self.model, pad_id=self.pad_id)
        model, plan = without(student, self.model, found.groups, found.plan, left_out)
        return replace(found, plan=plan), model

    def compare(self, model: nn.Module) -> dict[str, Any]:
        """Return a model's quality, and its distance from the dense one, on the whole split."""
        outputs = predict(model, self.head, self.rows, pad_id=self.pad_id)
        distance = fidelity(self.head.kind, self.dense, outputs)
        distance.pop("max_abs")
        return {"value": self.data.evaluation.score(outputs, self.dense).get(self.data.metric or ""), **distance}

    def describe(self, found: PrunedPlan) -> dict[str, Any]:
        """Return a plan's kept shares, of prunable FLOPs and all parameters, its counts per layer and its seconds."""
        seconds = {s["name"]: s["seconds"] for s in found.stages}
        share = found.surgery.flops(found.seq_len, found.plan) / found.surgery.flops(found.seq_len)
        return {
            "kept_flops": share,
            "kept_params": 1 - found.surgery.removed_params(found.plan) / self.params,
            "seq_len": found.seq_len,
            "seconds": round(sum(seconds.values()), 2),
            "stage_seconds": seconds,
            "declined": [d["group"] for s in found.stages for d in s.get("declined", [])],
            "layers": found.plan.layer_counts(),
        }

    @cached_property
    def params(self) -> int:
        """Return the dense model's parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def lut(self) -> LatencyTable | ChannelLatency:
        """Return the latency table. Raises InputError when none was given, or one of several shapes."""
        if self.setting.lut is None:
            raise InputError("This experiment needs a latency table.", hint="Make one with deploy-prune probe: --lut.")
        table = read_latency_table(self.setting.lut)
        if isinstance(table, LatencyTables):
            raise InputError(f"{self.setting.lut} is of several shapes.", hint="Probe this model at one length.")
        return table

    def predicted(self, found: PrunedPlan) -> float:
        """Return a plan's latency by the table, as a share of the dense model's."""
        assert self._pruner is not None  # which made the plan
        (limit,) = self._pruner[1].limits(Budget(keep_latency=1.0, lut=self.lut), found.lengths)
        return limit.table.cost(counts_of(found.groups, found.plan)) / limit.table.dense

    def whole(self) -> nn.Module:
        """Return the dense model in the form that `latency` takes."""
        surgery = self.pruner(self.setting.seeds[0]).surgery
        return surgery.slice(SlicePlan.from_masks(surgery.groups, MaskSet.ones(surgery.groups)))

    def latency(self, models: Mapping[str, nn.Module], seconds: float = 2.0) -> dict[str, tuple[float, Ratio]]:
        """Return the median in ms and the ratio to dense of every model, all measured side by side."""
        return self.side_by_side({name: self.candidate(model) for name, model in models.items()}, seconds)

    def side_by_side(self, candidates: Mapping[str, Candidate], seconds: float = 2.0) -> dict[str, tuple[float, Ratio]]:
        """Return the median in ms and the ratio to this lab's dense model of any models."""
        whole = {"dense": self.candidate(self.whole())}
        return time_models(whole | dict(candidates), self.head, self.place, seconds)

    def candidate(self, model: nn.Module) -> Candidate:
        """Return a sliced model as what can be timed."""
        return Candidate(model.cpu(), self.processor, input_signature(self.model, self.processor))

    @cached_property
    def rival(self) -> Lab:
        """Return the lab of the other checkpoint. Raises InputError when none was given."""
        if self.setting.rival is None:
            raise InputError("This experiment needs another checkpoint.", hint="Name one by --rival.")
        return Lab(replace(self.setting, model=self.setting.rival, rival=None, lut=None), self.reporter)

    @property
    def place(self) -> Place:
        """Return where latencies are measured."""
        s = self.setting
        if s.lut is not None:
            seq = self.lut.seq if isinstance(self.lut, LatencyTable) else 1
            return Place(self.lut.runtime, self.lut.batch, seq, s.threads or self.lut.threads or 1)
        seq = s.seq or int(np.ceil(np.mean([r.length for r in self.pruner(s.seeds[0]).rows])))
        return Place(s.runtime, s.batch, seq, s.threads or default_threads())

    def machine(self) -> dict[str, Any]:
        """Describe the machine."""
        return describe_machine(self.setting.threads or default_threads())


def with_keeps(keeps: Sequence[float], default: Sequence[float]) -> Sequence[float]:
    """Return the asked budgets, or an experiment's own."""
    return keeps or default
