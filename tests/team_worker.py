"""What each process of a team does in the tests. Alone, and under torchrun:

python tests/team_worker.py prune FOLDER       prune tiny models in several ways; the first process writes what came out
python tests/team_worker.py recover FOLDER     train a tiny student; each process writes its weights
python tests/team_worker.py die ARGUMENTS...   run the command line; the second process is killed in the scores
python tests/team_worker.py die-in-recovery ARGUMENTS...   likewise, in recovery, when a checkpoint has been written
python tests/team_worker.py each FOLDER,... ARGUMENTS...   run the command line in these folders; print the exit codes
python tests/team_worker.py cut-off FOLDER ARGUMENTS...    run the command line; the second process tells when it is in
                                               the scores, and waits there until somebody has cut the connection
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
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

from deploy_prune import hosts, parallel, prune
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


MOMENTS: dict[str, tuple[str, str, int]] = {  # when it happens to the second process: module, name, which call
    "die": ("deploy_prune.criteria.obs", "eliminate", 1),
    "cut-off": ("deploy_prune.criteria.obs", "eliminate", 1),
    "die-in-recovery": ("deploy_prune.distil", "DistilTrainer.evaluate", 2),
}
SILENCE = 4.0  # seconds after which a machine is taken for gone


def before(moment: tuple[str, str, int], act: Callable[[], None]) -> None:
    """Let something happen before a call of a function or method."""
    module, name, call = moment
    *parents, last = name.split(".")
    owner: Any = reduce(getattr, parents, importlib.import_module(module))
    original, calls = getattr(owner, last), count(1)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            act()
        return original(*args, **kwargs)

    setattr(owner, last, watched)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_cut(folder: Path) -> None:
    """Tell by a file that the process is in the middle of its work, and wait for another one."""
    (folder / "middle").touch()
    while not (folder / "cut").exists():
        time.sleep(0.05)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    np.random.seed(0)
    way, *words = sys.argv[1:]
    if way in MOMENTS:
        hosts.SILENCE = SILENCE
        folder = Path(words.pop(0)) if way == "cut-off" else Path()
        if os.environ["RANK"] == "1":
            before(MOMENTS[way], (lambda: wait_for_cut(folder)) if way == "cut-off" else die)
        sys.exit(invoke(words))
    if way == "each":
        codes = []
        for name in words[0].split(","):
            with contextlib.chdir(name):
                codes.append(invoke(words[1:]))
        print(json.dumps(codes))
        sys.exit()
    with parallel.team(torch.device("cpu")):
        {"prune": prune_all, "recover": recover_one}[way](Path(words[0]))
