"""The search: candidates by Optuna, discarded by the latency table, measured, and told to it.

The study is one journal, a text file of JSON lines that only grows: a kill leaves every finished trial in it, it needs
no database, and nothing in it is pickled. What a trial chooses depends on the seed and the finished ones alone.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ..errors import InfeasibleBudgetError, InputError, SystemStateError, VerdictError
from ..progress import Reporter
from .forecast import Forecast
from .space import WHOLE, Choice
from .verdict import Limits, Record, feasible, points, title
from .workbench import Workbench

STARTUP_TRIALS = 8  # before the optimiser has a model of its own
ASKED_PER_TRIAL = 20  # proposals for each candidate that is made: the others are discarded or known
AIMED = 3  # shares of each form that are aimed at the target by prediction
STEP = 5  # percent by which the next aim is lower than one that was late
KEPT = 3  # bundles of candidates that may win; others are removed


@dataclass
class Hunt:
    """Hold the study and what its trials are made on."""

    bench: Workbench
    limits: Limits
    study: optuna.Study
    reporter: Reporter

    def run(self) -> None:
        """Propose, discard, measure and tell until the trials or the minutes are used up."""
        settings = self.bench.settings
        deadline = math.inf if settings.minutes is None else time.monotonic() + 60 * settings.minutes
        self._clear()
        with self.reporter.stage("tune") as progress:
            while not self._enough() and time.monotonic() < deadline:
                self._one()
                progress(min(1.0, self._made() / settings.trials))
        if (made := self._made()) < settings.trials and self._enough():
            self.reporter.note(
                f"{made} candidates made of {settings.trials}: of {len(self.records())} proposals the others were known"
                " already, or discarded."
            )

    def _clear(self) -> None:
        """End what a killed run had begun, or planned next: it is proposed again, for nothing has changed since."""
        while self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.ask()  # which would give it in the place of the next proposal
        for begun in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(begun.number, state=TrialState.FAIL)

    def records(self) -> list[dict[str, Any]]:
        """Return what is known of every finished trial, in their order."""
        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return [trial.user_attrs["record"] for trial in finished]

    def _made(self) -> int:
        return sum(r["state"] in ("measured", "failed") for r in self.records())

    def _enough(self) -> bool:
        trials = self.bench.settings.trials
        return self._made() >= trials or len(self.records()) >= ASKED_PER_TRIAL * trials

    def _planned(self) -> Choice | None:
        """Return what is tried before the optimiser's own proposals, None once all of that is done.

        First the dense model in every form: it may do, and predictions are shares of its latency. Then, in turns, the
        largest share of each form that is predicted to reach the target, up to `AIMED` times: each measurement corrects
        the next prediction, and nothing is aimed at that keeps as much as an aim that was late.
        """
        records, forecast = self.records(), self.forecast
        forms, align = self.bench.space.forms, self.bench.settings.aligns[0]
        if untried := [form for form in forms if forecast.dense(form) is None]:
            return Choice(WHOLE, align, untried[0])
        tried = {(round(100 * r["keep"]), r["form"]) for r in records}
        aims = {f.name: [r for r in records if r["aimed"] and r["form"] == f.name and r["keep"] < 1] for f in forms}
        for form in sorted(forms, key=lambda f: len(aims[f.name])):
            percent = forecast.largest(form, self.limits.target_ms) if len(aims[form.name]) < AIMED else None
            if percent is None:
                continue
            made = [r for r in aims[form.name] if r["state"] == "measured"]
            late = [round(100 * r["keep"]) for r in made if r["latency"]["high_ms"] > self.limits.target_ms]
            percent = min([percent, *(p - STEP for p in late)])
            if percent >= self.bench.space.least and (percent, form.name) not in tried:
                return Choice(percent, align, form)
        return None

    @property
    def forecast(self) -> Forecast:
        """Return what is predicted by all that is known."""
        return Forecast(self.bench, self.records())

    def _one(self) -> None:
        """Run one trial."""
        finished = len(self.records())
        self.study.sampler = optuna.samplers.TPESampler(
            seed=self.bench.settings.seed + finished, n_startup_trials=STARTUP_TRIALS
        )
        if (planned := self._planned()) is not None:
            self.study.enqueue_trial(planned.params)
        trial = self.study.ask()
        choice = self.bench.space.suggest(trial)
        record: dict[str, Any] = {
            "number": trial.number,
            "keep": choice.keep,
            "align": choice.align,
            "form": choice.form.name,
            "state": "measured",
            "aimed": planned is not None,
            "table_ms": None,
            "predicted_ms": None,
        }
        known = next((r for r in self.records() if self._same(r, record)), None)
        if known is not None:
            record |= {**known, "number": trial.number, "state": "repeated", "of": known["number"]}
        elif (reason := self._discarded(choice, record)) is not None:
            record |= {"state": "discarded", "reason": reason}
        else:
            self._made_now(choice, record)
        self._tell(trial, record)

    @staticmethod
    def _same(known: dict[str, Any], record: dict[str, Any]) -> bool:
        names = ("keep", "form") if record["keep"] == 1 else ("keep", "align", "form")  # dense has no widths to align
        return known["state"] != "repeated" and all(known[name] == record[name] for name in names)

    def _discarded(self, choice: Choice, record: dict[str, Any]) -> str | None:
        """Say why a choice is not worth making, or None."""
        if choice.whole:
            return None
        forecast = self.forecast
        dense = forecast.dense(choice.form)
        if dense is not None and dense["state"] == "failed":
            return f"the dense model cannot be had in this form: {dense['reason']}"
        try:
            record["table_ms"] = forecast.table_ms(choice)
        except InfeasibleBudgetError as error:
            return error.message
        record["predicted_ms"] = predicted = forecast.ms(choice)
        if predicted is None:
            return None
        target, slack = self.limits.target_ms, self.bench.settings.slack
        if predicted > target * (1 + slack):
            return f"it is predicted to take {predicted:.3g} ms, far above {target:g}"
        if predicted < target * (1 - slack):
            return f"it is predicted to take {predicted:.3g} ms, far below {target:g}: more could stay"
        return None

    def _made_now(self, choice: Choice, record: dict[str, Any]) -> None:
        name = f"{record['number']:04d}"
        try:
            self.bench.trial(name, choice, record)
        except (InputError, SystemStateError, VerdictError) as error:
            record |= {"state": "failed", "reason": error.message}
        said = record.get("reason")
        if said is None:
            latency = record["latency"]
            said = f"{latency['median_ms']:.3g} ms up to {latency['high_ms']:.3g}, {points(record['loss'])}"
        self.reporter.note(f"{title(record)}: {said}")
        likely = [r["number"] for r in feasible([*self.records(), record], self.limits)[:KEPT]]
        for path in self.bench.folder.glob("[0-9]" * 4):
            if int(path.name) not in likely:
                self.bench.drop(path.name)

    def _tell(self, trial: optuna.Trial, record: dict[str, Any]) -> None:
        trial.set_user_attr("record", record)
        if "loss" not in record:
            self.study.tell(trial, state=TrialState.PRUNED)
            return
        trial.set_constraint("latency", record["latency"]["high_ms"] - self.limits.target_ms)
        trial.set_constraint("quality", record["loss"] - self.limits.max_loss)
        self.study.tell(trial, [record["latency"]["high_ms"], record["loss"]])

    def nearest(self) -> None:
        """Make the candidate of the least predicted latency where none was made but the dense ones.

        Where every prediction is far off the target, the front would otherwise hold nothing that was pruned.
        """
        discarded = [r for r in self.records() if r["state"] == "discarded" and r["predicted_ms"] is not None]
        made = [r for r in self.records() if r["state"] == "measured" and r["keep"] < 1]
        if made or not discarded or feasible(self.records(), self.limits):
            return
        least = min(discarded, key=lambda r: (r["predicted_ms"], r["number"]))
        form = next(f for f in self.bench.space.forms if f.name == least["form"])
        self.study.enqueue_trial(Choice(round(100 * least["keep"]), least["align"], form).params)
        trial = self.study.ask()
        record = {**least, "number": trial.number, "state": "measured"}
        record.pop("reason")
        self._made_now(self.bench.space.suggest(trial), record)
        self._tell(trial, record)

    def confirmed(self) -> tuple[dict[str, Any] | None, dict[int, dict[str, Any]]]:
        """Return the best candidate that keeps the limits in a second measurement too, and those that did not.

        The best of many is often the one that was lucky: it has to be as fast in fresh processes, for twice as long.
        """
        refuted: dict[int, dict[str, Any]] = {}
        for record in feasible(self.records(), self.limits):
            again = self.study.user_attrs.get("again", {}).get(str(record["number"])) or self._again(record)
            if not self.limits.failures(record, again):
                return {**record, "again": again}, refuted
            refuted[record["number"]] = again
        return None, refuted

    def _again(self, record: Record) -> dict[str, Any]:
        form = next(f for f in self.bench.space.forms if f.name == record["form"])
        choice = Choice(round(100 * record["keep"]), record["align"], form)
        root = self.bench.folder / f"{record['number']:04d}"
        with self.reporter.stage("confirm"):
            if not (root / "manifest.json").is_file():
                root = self.bench.make(root.name, choice, {})
            again = asdict(self.bench.measure(root, form, 2 * self.bench.settings.seconds))
        known = self.study.user_attrs.get("again", {})
        self.study.set_user_attr("again", {**known, str(record["number"]): again})
        return again


@contextmanager
def open_study(folder: Path, key: str) -> Iterator[optuna.Study]:
    """Open the study of a key in a folder's journal; other settings and other data have studies of their own in it.

    The caller holds the folder's lock. Raises SystemStateError when the journal cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = folder / "study.log"
    _mend(journal)
    try:
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            study_name=key, storage=storage, directions=["minimize", "minimize"], load_if_exists=True
        )
    except (ValueError, KeyError) as error:
        raise SystemStateError(
            f"The study in {folder} cannot be read: {error}", hint="Remove the folder; its trials are then made anew."
        ) from error
    yield study


def _mend(journal: Path) -> None:
    """Take away what a run that was killed while it wrote has left: half a line, and the journal's own lock."""
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    if journal.is_file():
        written = journal.read_bytes()
        if not written.endswith(b"\n"):
            os.truncate(journal, written.rfind(b"\n") + 1)
