"""Measure latency, memory and FLOPs."""

if __name__ == "runtime_bench":  # a bare `import runtime_bench` from the repository's root would shadow other packages
    raise ImportError("Import this package as deploy_prune.runtime_bench (pip install -e . maps the folder).")
