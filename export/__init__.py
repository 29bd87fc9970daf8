"""Write the artifacts that inference runtimes load."""

if __name__ == "export":  # a bare `import export` from the repository's root would shadow other packages
    raise ImportError("Import this package as deploy_prune.export (pip install -e . maps the folder).")
