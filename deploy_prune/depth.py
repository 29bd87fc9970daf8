"""Leave whole sub-layers and layers out, chosen greedily by the measured change of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .archs import arch_of
from .batches import Batch, Batches
from .config import Recipe
from .errors import InputError
from .heads import Head
from .masking import OutputWeights, scatter
from .progress import Progress
from .slicing import slice_model
from .tasks.base import Row
from .units import SlicePlan, UnitGroup

Constants = Mapping[str, Tensor]  # group name -> what stands for its projection's output (d,)


@dataclass(frozen=True)
class Depth:
    """Say how many whole layers, and then how many sub-layers, go, and on how many rows that is measured.

    Both are numbers, or shares in (0, 1) of what the model has, rounded down.
    """

    layers: float = 0
    sublayers: float = 0
    rows: int = 256

    @classmethod
    def of(cls, recipe: Recipe) -> Depth:
        """Return what a recipe asks for."""
        return cls(recipe.drop_layers, recipe.drop_sublayers, recipe.depth_rows)

    def __bool__(self) -> bool:
        return self.layers > 0 or self.sublayers > 0

    def counts(self, groups: Sequence[UnitGroup]) -> tuple[int, int]:
        """Return the numbers of layers and of sub-layers. Raises InputError for a share of less than one."""
        return _count(self.layers, len(_layers(groups)), "layers"), _count(self.sublayers, len(groups), "sub-layers")


def _count(asked: float, there: int, name: str) -> int:
    if not 0 < asked < 1:
        return int(asked)
    count = int(asked * there + 1e-9)  # 0.3 * 10 is a little less than 3
    if not count:
        raise InputError(
            f"{asked:g} of {there} {name} is less than one.", hint=f"Ask for at least {1 / there:.2g}, or for a number."
        )
    return count


@dataclass
class LeftOut:
    """Hold the groups that go, what stands for each, and the loss before and after every removal."""

    names: list[str]
    constants: dict[str, Tensor]
    loss_before: float
    log: list[dict[str, Any]] = field(default_factory=list)

    def record(self, rows: int) -> dict[str, Any]:
        """Return what a manifest says of the choice."""
        return {"rows": rows, "loss_before": self.loss_before, "removals": self.log}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the constants as tensors by group, and the rest as plain values."""
        return self.constants, {"names": self.names, "loss_before": self.loss_before, "log": self.log}

    @classmethod
    def unpack(cls, kept: tuple[dict[str, Tensor], dict[str, Any]]) -> LeftOut:
        """Return what `pack` gave, its constants on the CPU."""
        return cls(constants=kept[0], **kept[1])


@torch.no_grad()
def choose(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    head: Head,
    rows: Sequence[Row],
    depth: Depth,
    *,
    means: bool = True,
    given: Sequence[str] = (),
    teacher: nn.Module | None = None,
    label_free: bool = False,
    pad_id: int = 0,
    progress: Progress = lambda share: None,
) -> LeftOut:
    """Choose what to leave out of a dense or sliced model, one removal at a time, each measured on the first rows.

    A candidate is a sub-layer that still has units, or a layer: all its sub-layers. What stands for it is its mean
    output over unpadded tokens, as the model is then (`means`), else its projection's bias. The candidate goes
    whose absence leaves the smallest mean loss: that of the labels, or without labels the distance from the
    `teacher` (default: the model as it is given). `given` groups are gone from the start. A removal costs a forward
    pass for each candidate, from its layer upwards.

    Raises InputError where nothing would be left, for a share of less than one, an unknown group and missing labels.
    """
    layers, sublayers = depth.counts(groups)
    by_name = {g.name: g for g in groups}
    if unknown := sorted(set(given) - set(by_name)):
        raise InputError(f"No group {unknown[0]} to leave out.", hint=f"There are: {', '.join(by_name)}.")
    device = next(model.parameters()).device
    feeds = [batch.to(device) for batch in Batches(rows[: depth.rows], head, pad_id)]
    if not label_free and any(batch.labels is None for batch in feeds):
        raise InputError("Some calibration rows have no label.", hint="Use label-free calibration.")
    wanted = [head.outputs(teacher or model, batch.inputs) for batch in feeds] if label_free else None
    measure = _Measure(model, groups, head, feeds, wanted)
    now = measure.constants(means, {})
    found = LeftOut(list(given), {name: now[name] for name in given}, 0.0)
    found.loss_before = measure.losses(found.constants, [{}])[0]
    total = layers + sublayers
    for step in range(total):
        left = [g for g in groups if g.name not in found.constants]
        candidates = [(g,) for g in left] if step >= layers else _layers(left)
        if len(candidates) <= 1:
            raise InputError(
                f"Leaving out {layers} layers and {sublayers} sub-layers leaves nothing of the model.",
                hint="Leave out fewer.",
            )
        if step:
            now = measure.constants(means, found.constants)
        options = [{g.name: now[g.name] for g in candidate} for candidate in candidates]
        losses = measure.losses(found.constants, options)
        best = min(range(len(losses)), key=losses.__getitem__)
        found.names += list(options[best])
        found.constants |= options[best]
        found.log.append({"groups": list(options[best]), "loss": losses[best], "candidates": len(losses)})
        progress((step + 1) / total)
    return found


def without(
    student: nn.Module, dense: nn.Module, groups: Sequence[UnitGroup], plan: SlicePlan, left_out: LeftOut
) -> tuple[nn.Module, SlicePlan]:
    """Return a sliced model without the sub-layers that were chosen on it, and its plan; nothing is changed.

    Each adds its constant and computes nothing. `plan` is the student's, whose scales its weights hold.
    """
    masks = plan.folded().masks()
    for name in left_out.names:
        masks[name][:] = 0.0
    shallow = SlicePlan.from_masks(groups, masks)
    device = next(dense.parameters()).device
    constants = {g.name: (g, left_out.constants[g.name].to(device)) for g in groups if g.name in left_out.constants}
    updates = {name: OutputWeights(c.new_zeros(g.hidden, 0), c) for name, (g, c) in constants.items()}
    whole = scatter(dense, groups, plan, student.state_dict())
    return slice_model(whole, groups, shallow, updates), shallow


def _layers(groups: Sequence[UnitGroup]) -> list[tuple[UnitGroup, ...]]:
    numbers = sorted({g.layer for g in groups})
    return [tuple(g for g in groups if g.layer == number) for number in numbers]


class _Measure:
    """Run a model over batches with some sub-layers bypassed."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        head: Head,
        feeds: Sequence[Batch],
        wanted: Sequence[Mapping[str, Tensor]] | None,
    ) -> None:
        self.model, self.head, self.feeds, self.wanted = model, head, feeds, wanted
        self.groups = {g.name: g for g in groups}
        self.consumers: dict[str, Any] = {g.name: model.get_submodule(g.consumer) for g in groups}
        self.layers: list[Any] = [model.get_submodule(path) for path in arch_of(model).layer_paths(model)]

    def constants(self, means: bool, gone: Constants) -> dict[str, Tensor]:
        """Return what would stand for each sub-layer: the mean (d,) of its output, or its projection's bias."""
        if not means:
            return {name: module.bias.detach().clone() for name, module in self.consumers.items()}
        sums: dict[str, Any] = dict.fromkeys(self.groups, 0.0)
        for batch in self.feeds:
            with self._bypass(gone), _outputs(self.consumers) as seen:
                self.head.outputs(self.model, batch.inputs)
            weight = batch.mask.unsqueeze(-1).double()
            for name, output in seen.items():
                sums[name] = sums[name] + (output.double() * weight).sum((0, 1))
        tokens = sum(batch.mask.sum() for batch in self.feeds)
        return {name: (total / tokens).to(self.consumers[name].bias) for name, total in sums.items()}

    def losses(self, gone: Constants, options: Sequence[Constants]) -> list[float]:
        """Return the mean loss of a row with `gone` bypassed and each option beside it.

        The layers below an option's first are not run again: they hand on what they gave without it.
        """
        totals = [torch.zeros((), dtype=torch.float64, device=self.feeds[0].mask.device) for _ in options]
        for number, batch in enumerate(self.feeds):
            with self._bypass(gone), _outputs(dict(enumerate(self.layers))) as below:
                outputs = self.head.outputs(self.model, batch.inputs)
            for k, option in enumerate(options):
                if option:
                    lowest = min(self.groups[name].layer for name in option)
                    with self._bypass({**gone, **option}), self._replay(below, lowest):
                        outputs = self.head.outputs(self.model, batch.inputs)
                totals[k] += self._loss(outputs, number).double().sum()
        rows = sum(len(batch.index) for batch in self.feeds)
        return (torch.stack(totals) / rows).tolist()

    def _loss(self, outputs: Mapping[str, Tensor], number: int) -> Tensor:
        batch = self.feeds[number]
        if self.wanted is not None:
            return self.head.distance(outputs, self.wanted[number], batch.mask)
        return self.head.loss(outputs, batch.labels, batch.mask)  # type: ignore[arg-type]

    @contextmanager
    def _bypass(self, constants: Constants) -> Iterator[None]:
        """Let projections give their constants."""

        def stand_in(constant: Tensor) -> Any:
            return lambda module, args, output: constant.expand_as(output)

        handles = [self.consumers[name].register_forward_hook(stand_in(c)) for name, c in constants.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _replay(self, outputs: Mapping[int, Any], lowest: int) -> Iterator[None]:
        """Let the layers below the lowest hand on what they gave before."""

        def known(output: Any) -> Any:
            return lambda *args, **kwargs: output

        below = self.layers[:lowest]
        for depth, layer in enumerate(below):
            layer.forward = known(outputs[depth])
        try:
            yield
        finally:
            for layer in below:
                del layer.forward  # the class's own comes back


@contextmanager
def _outputs(modules: Mapping[Any, nn.Module]) -> Iterator[dict[Any, Any]]:
    """Record what modules give, whatever its form."""
    seen: dict[Any, Any] = {}

    def record(key: Any) -> Any:
        return lambda module, args, output: seen.__setitem__(key, output)

    handles = [module.register_forward_hook(record(key)) for key, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
