"""Write the artifacts that inference runtimes load."""

if __name__ == "export":  # a bare `import export` from the repository's root would shadow other packages
    raise ImportError("Import this package as deploy_prune.export (pip install -e . maps the folder).")

from .parity import check_parity
from .registry import Exporter, available_exporters
from .room import export_bundle

__all__ = ["Exporter", "available_exporters", "check_parity", "export_bundle"]
