"""Run the command line as `python -m deploy_prune`."""

from .cli import main

if __name__ == "__main__":
    main()
