"""The other side of `isolate.Worker`: make an object, then answer calls, a line of JSON each, until stdin closes."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any


def main() -> None:
    """Serve one object. What libraries print goes to stderr: stdout carries the answers alone."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        held: Any = None
        for line in sys.stdin:
            request = json.loads(line)
            try:
                if "factory" in request:
                    module, name = request["factory"].split(":")
                    held = getattr(importlib.import_module(module), name)(**request["arguments"])
                    text = json.dumps({"result": None})
                else:
                    result = getattr(held, request["method"])(**request["arguments"])
                    text = json.dumps({"result": result})
            except Exception as error:  # whatever it is, the parent reports it
                message = getattr(error, "message", None) or str(error) or type(error).__name__
                details = {"kind": type(error).__name__, "message": message, "traceback": traceback.format_exc()}
                text = json.dumps({"error": details})
            answers.write(text + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
