"""Fine-tune an encoder (see encoders.py; by default the demo's) on a task, for the tables of docs/results.md.

    python recipes/experiments/finetune.py stsb --data glue/STS-B --out models/stsb
    python recipes/experiments/finetune.py mrpc --data glue/MRPC --out models/mrpc
    python recipes/experiments/finetune.py rte --data glue/RTE --out models/rte
    python recipes/experiments/finetune.py sst2-short --encoder mpnet --data glue/SST-2 --out models/mpnet
    python recipes/experiments/finetune.py sst2-short --encoder distilbert --data glue/SST-2 --out models/distilbert
    python recipes/experiments/finetune.py squad --data squad --out models/squad
    python recipes/experiments/finetune.py truecase --data squad --out models/truecase

`--out` gets a stock transformers folder and metrics.json; truecase writes its CoNLL files to OUT-data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from encoders import ENCODERS, write_encoder
from truecase import TAGS, write_conll

from deploy_prune.calibration import sample_indices
from deploy_prune.finetune import Learner, Recipe
from deploy_prune.tasks import HeadKind, load_task


@dataclass(frozen=True)
class Experiment:
    """Hold one row of the table: a task, the names of its labels, and how to train it."""

    task: str
    head: HeadKind
    labels: tuple[str, ...]
    max_length: int
    recipe: Recipe
    most_rows: int | None = None  # drawn at random, where the split has more


EXPERIMENTS = {
    "stsb": Experiment("stsb", "regression", ("score",), 64, Recipe(2, 16, 5e-5)),
    "mrpc": Experiment("mrpc", "classification", ("not_equivalent", "equivalent"), 80, Recipe(4, 16, 1e-4)),
    "rte": Experiment("rte", "classification", ("entailment", "not_entailment"), 128, Recipe(4, 16, 1e-4)),
    "sst2-short": Experiment("sst2", "classification", ("negative", "positive"), 64, Recipe(1, 16, 3e-5), 8192),
    "squad": Experiment("squad", "qa", (), 256, Recipe(1, 16, 2e-4)),
    "truecase": Experiment("token-classification", "token", TAGS, 64, Recipe(2, 16, 2e-4)),
}


def finetune(experiment: Experiment, encoder: Path, data: Path, out: Path) -> dict[str, object]:
    """Train, measure before and after on the evaluation split, save; return what was measured."""
    recipe = experiment.recipe
    learner = Learner.from_encoder(encoder, experiment.head, dict(enumerate(experiment.labels)), recipe.seed)
    task = load_task(
        experiment.task,
        tokenizer=learner.processor,
        config=learner.model.config,
        data=data,
        max_length=experiment.max_length,
        architecture=type(learner.model).__name__,
    )
    rows = task.evaluation.rows()
    untrained = task.evaluation.score(learner.predict(rows))
    start = time.perf_counter()
    chosen = sample_indices(len(task.train), experiment.most_rows or len(task.train), recipe.seed)
    learner.train(task.train.encode(chosen), recipe)
    seconds = time.perf_counter() - start
    trained = task.evaluation.score(learner.predict(rows))
    learner.save(out)
    return {
        "task": experiment.task,
        "metric": task.metric,
        "trained": trained,
        "untrained": untrained,
        "rows": {"train": len(chosen), task.evaluation.name: len(task.evaluation)},
        "max_length": experiment.max_length,
        "recipe": vars(recipe),
        "train_seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, required=True, help="folder with the task's files")
    parser.add_argument("--out", type=Path, required=True, help="where to save the model")
    parser.add_argument("--encoder", default="minilm", help="a name of encoders.py, or a local folder")
    arguments = parser.parse_args()
    data = arguments.data
    if arguments.experiment == "truecase":
        data = arguments.out.with_name(f"{arguments.out.name}-data")
        write_conll(arguments.data, data)
    with tempfile.TemporaryDirectory() as scratch:
        encoder = Path(arguments.encoder)
        if arguments.encoder in ENCODERS:
            encoder = write_encoder(arguments.encoder, Path(scratch) / "encoder")
        measured = finetune(EXPERIMENTS[arguments.experiment], encoder, data, arguments.out)
    text = json.dumps(measured, indent=2)
    (arguments.out / "metrics.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
