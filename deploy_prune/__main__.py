"""Run the command line, as `deploy-prune` and as `python -m deploy_prune`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, or say which extra it needs: the edge's installation has none."""
    try:
        from . import cli
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "jinja2"):
            raise
        print(
            f"The command line needs the package '{error.name}', which is not installed.\n"
            "  Install the extra: pip install 'deploy-prune[cpu]'. This installation reads bundles from Python:"
            " deploy_prune.serve.load(BUNDLE)",
            file=sys.stderr,
        )
        sys.exit(3)
    cli.main()


if __name__ == "__main__":
    main()
