"""Write the artifacts that inference runtimes load."""

if __name__ == "export":  # a bare `import export` from the repository's root would shadow other packages
    raise ImportError("Import this package as deploy_prune.export (pip install -e . maps the folder).")

from .evaluation import Evaluation, evaluation_of
from .parity import check_parity
from .registry import Exporter, Kind, Options, available_exporters, plan_kinds
from .room import Exported, export_bundle
from .verify import verify_bundle

__all__ = [
    "Evaluation",
    "Exported",
    "Exporter",
    "Kind",
    "Options",
    "available_exporters",
    "check_parity",
    "evaluation_of",
    "export_bundle",
    "plan_kinds",
    "verify_bundle",
]
