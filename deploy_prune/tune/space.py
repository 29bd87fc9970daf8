"""What can be chosen: the share of FLOPs that stays, the alignment, and the form in which the model is shipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optuna

from ..errors import InputError
from ..export import Kind, Options, plan_kinds
from ..measuring import FORMAT_OF
from ..runtimes import available_runtimes
from .settings import TuneSettings

WHOLE = 100  # percent: the dense model


@dataclass(frozen=True)
class Form:
    """Name a runtime and the kind of file it reads; None where it loads the checkpoint."""

    runtime: str
    kind: Kind | None

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.kind.label if self.kind else 'checkpoint'}"

    @property
    def precision(self) -> str:
        return self.kind.precision if self.kind else "fp32"

    def options(self) -> Options:
        """Return the export's options that make this kind alone."""
        if self.kind is None or self.kind.format != "onnx":
            return Options(schemes=("qdq",))
        return Options(dialects=(self.kind.dialect,), schemes=(self.kind.scheme or "dynamic",))


@dataclass(frozen=True)
class Choice:
    """Hold one point of the space; `percent` of the FLOPs stay."""

    percent: int
    align: int
    form: Form

    @property
    def keep(self) -> float:
        return self.percent / 100

    @property
    def whole(self) -> bool:
        """Say whether it is the dense model itself."""
        return self.percent == WHOLE

    @property
    def params(self) -> dict[str, Any]:
        """Return the parameters by which the optimiser knows it."""
        return {"keep_percent": self.percent, "align": self.align, "form": self.form.name}


@dataclass(frozen=True)
class Space:
    """Hold all forms, and say why others that were asked for are none."""

    settings: TuneSettings
    forms: tuple[Form, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, settings: TuneSettings) -> Space:
        """Return the forms that this machine's runtimes read. Raises InputError for an unknown name, or for none."""
        forms: list[Form] = []
        left_out: list[str] = []
        options = Options(dialects=settings.dialects, schemes=settings.schemes)
        for runtime in settings.runtimes:
            _check_runtime(runtime)
            if runtime not in FORMAT_OF:
                if "fp32" in settings.precisions:
                    forms.append(Form(runtime, None))
                continue
            kinds, skipped = plan_kinds((FORMAT_OF[runtime],), settings.precisions, options)
            forms += [Form(runtime, kind) for kind in kinds]
            left_out += [f"{runtime} {s.precision or ''}: {s.reason}" for s in skipped]
        if not forms:
            raise InputError(
                f"No form of the model is left to choose from ({'; '.join(left_out) or 'no precision fits'}).",
                hint="Name other --precisions or --runtimes.",
            )
        return cls(settings, tuple(forms), tuple(left_out))

    def baseline(self, runtime: str) -> Form:
        """Return the form in which the dense model runs beside a runtime's candidates: fp32."""
        if runtime not in FORMAT_OF:
            return Form(runtime, None)
        kinds, _ = plan_kinds((FORMAT_OF[runtime],), ("fp32",), Options(dialects=self.settings.dialects))
        return Form(runtime, kinds[0])

    def suggest(self, trial: optuna.Trial) -> Choice:
        """Let the optimiser choose a point."""
        named = {form.name: form for form in self.forms}
        percent = trial.suggest_int("keep_percent", self.least, WHOLE)
        align = int(trial.suggest_categorical("align", self.settings.aligns))
        return Choice(percent, align, named[str(trial.suggest_categorical("form", list(named)))])

    @property
    def least(self) -> int:
        """Return the smallest percentage."""
        return max(1, round(100 * self.settings.min_keep))

    def dense(self, form: Form) -> Choice:
        """Return the dense model in a form."""
        return Choice(WHOLE, self.settings.aligns[0], form)


def _check_runtime(runtime: str) -> None:
    if runtime not in available_runtimes():
        raise InputError(f"No runtime '{runtime}'.", hint=f"There are: {', '.join(sorted(available_runtimes()))}.")
