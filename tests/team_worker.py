"""What each process of a team does in the tests. Alone, and under torchrun:

python tests/team_worker.py prune FOLDER       prune tiny models in several ways; the first process writes what came out
python tests/team_worker.py recover FOLDER     train a tiny student; each process writes its weights
python tests/team_worker.py die ARGUMENTS...   run the command line; the second process is killed in the scores
python tests/team_worker.py die-in-recovery ARGUMENTS...   likewise, in recovery, when a checkpoint has been written
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from functools import reduce
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conv_tiny import tiny_cnn, tiny_images
from models_tiny import tiny_model, tiny_rows
from safetensors.torch import save_file
from sweeps_tiny import ragged_plan

from deploy_prune import parallel, prune
from deploy_prune.cli import invoke
from deploy_prune.costs import Budget
from deploy_prune.depth import Depth
from deploy_prune.distil import Weights
from deploy_prune.heads import Head
from deploy_prune.recover import Recovery, recover
from deploy_prune.slicing import slice_model
from deploy_prune.stages import Options, PrunedPlan
from deploy_prune.tasks.base import Row

ROWS = 290  # the last chunk is not full, and the sections do not have the same number of chunks
WAYS: dict[str, tuple[str, Options]] = {
    "refit": ("bert", Options()),
    "paper": ("bert", Options(criterion="fisher", compensate="mask-tuning", rearrange="sample")),
    "steps": ("distilbert", Options(steps=2, label_free=True)),
    "depth": ("roberta", Options(compensate="refit-parallel", depth=Depth(sublayers=1, rows=64))),
    "images": ("vit", Options(criterion="activation")),
    "channels": ("basic", Options(label_free=True)),
    "folded": ("basic", Options(criterion="reconstruction", compensate="fold+batch-norm")),
}


def pruned(family: str, options: Options) -> PrunedPlan:
    if family == "basic":
        images = tiny_images(family, ROWS, 0).numpy()
        rows = [Row({"pixel_values": x}, n % 4, tokens=1) for n, x in enumerate(images)]
        return prune(tiny_cnn(family), rows, Budget(0.6), options=options)
    return prune(tiny_model(family), tiny_rows(ROWS, family=family), Budget(0.6), options=options)


def prune_all(folder: Path) -> None:
    hashes = {}
    for name, (family, options) in WAYS.items():
        found = pruned(family, options)
        hashes[name] = found.hash
        state = {key: value.contiguous() for key, value in found.slice().state_dict().items()}
        if parallel.rank() == 0:
            save_file(state, folder / f"{name}.safetensors")
    if parallel.rank() == 0:
        (folder / "hashes.json").write_text(json.dumps(hashes))


def recover_one(folder: Path) -> None:
    teacher = tiny_model("bert")
    groups, plan = ragged_plan(teacher)
    student = slice_model(teacher, groups, plan)
    settings = Recovery(epochs=2, lr=1e-3, batch_rows=24, weights=Weights(hidden=0.0))
    record = recover(student, teacher, Head("classification"), tiny_rows(ROWS), settings, folder=folder / "scratch")
    save_file(dict(student.state_dict()), folder / f"student-{parallel.rank()}.safetensors")
    (folder / f"record-{parallel.rank()}.json").write_text(json.dumps(record, default=float))


DEATHS: dict[str, tuple[str, str, int]] = {  # what the second process does not survive: module, name, which call
    "die": ("deploy_prune.criteria.obs", "eliminate", 1),
    "die-in-recovery": ("deploy_prune.distil", "DistilTrainer.evaluate", 2),
}


def dies(module: str, name: str, call: int) -> None:
    """Let a call of a function or method kill the process."""
    *parents, last = name.split(".")
    owner: Any = reduce(getattr, parents, importlib.import_module(module))
    original, calls = getattr(owner, last), count(1)

    def mortal(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, last, mortal)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    np.random.seed(0)
    if sys.argv[1] in DEATHS:
        if os.environ["RANK"] == "1":
            dies(*DEATHS[sys.argv[1]])
        sys.exit(invoke(sys.argv[2:]))
    with parallel.team(torch.device("cpu")):
        {"prune": prune_all, "recover": recover_one}[sys.argv[1]](Path(sys.argv[2]))
