"""The fresh process of `run_isolated`: read a request from stdin, write the reply to the file it names."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Call the requested function and write its result or its error as JSON."""
    request = json.loads(sys.stdin.read())
    module, name = request["function"].split(":")
    answer: dict[str, Any]
    try:
        answer = {"result": getattr(importlib.import_module(module), name)(**request["arguments"])}
        text = json.dumps(answer)
    except Exception as error:  # whatever it is, the parent reports it
        message = getattr(error, "message", None) or str(error) or type(error).__name__
        details = {"kind": type(error).__name__, "message": message, "traceback": traceback.format_exc()}
        text = json.dumps({"error": details})
    temporary = request["reply"] + ".tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(temporary, request["reply"])


if __name__ == "__main__":
    main()
