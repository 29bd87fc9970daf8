"""The one exception tree; every message says what is wrong, where, and how to mend it.

DeployPruneError
├── VerdictError            exit 1   parity, quality guard or gate failed
├── InputError              exit 2   usage or bad input
│   ├── DataError                    a data file or its columns
│   ├── UnsupportedModelError        an architecture that cannot be pruned, with the reason
│   ├── InfeasibleBudgetError        carries the smallest reachable budget
│   └── BundleError                  a corrupted or newer bundle
├── MissingExtraError       exit 3   an optional package is not installed
└── SystemStateError        exit 4   disk full, no such device, no network and an empty cache
    └── LostProcessError             another process of the same run has ended; what is finished is kept

DismissedError is how the other processes of a run end when one of them fails; it has that one's exit code.
"""

from __future__ import annotations


class DeployPruneError(Exception):
    """Base of all errors a user can mend; `hint` says how."""

    exit_code = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class VerdictError(DeployPruneError):
    """A check that the user asked for came out negative."""

    exit_code = 1


class InputError(DeployPruneError):
    """Wrong usage or unusable input."""

    exit_code = 2


class DataError(InputError):
    """A data file is missing, empty or does not have the columns or labels it should."""


class UnsupportedModelError(InputError):
    """The model cannot be pruned by this version; the message names the reason."""


class InfeasibleBudgetError(InputError):
    """No plan fits the budget; `smallest` is the smallest reachable share of the dense cost."""

    def __init__(self, message: str, *, smallest: float, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.smallest = smallest


class BundleError(InputError):
    """A bundle is missing, corrupted, or written by a newer major version."""


class MissingExtraError(DeployPruneError):
    """A package of an optional extra is not installed."""

    exit_code = 3

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs the package '{package}', which is not installed.",
            hint=f"Install the extra: pip install 'deploy-prune[{extra}]'",
        )


class SystemStateError(DeployPruneError):
    """The machine cannot do it now: disk full, no such device, no network and nothing cached."""

    exit_code = 4


class LostProcessError(SystemStateError):
    """A process that worked on the same run is gone; the stages that were finished are kept."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint="Run it again: what is finished is kept and used.")


class DismissedError(DeployPruneError):
    """Another process of a team ended with an error that it tells by itself; the first process shows it as well."""

    def __init__(self, exit_code: int, message: str = "The first process has failed.", *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code
