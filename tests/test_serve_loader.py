"""The edge loader: every head answers as the torch model does from its files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from bundles_tiny import exported_bundle, input_names, make_bundle, run_torch
from hypothesis import given
from hypothesis import strategies as st

from deploy_prune.bundle import Bundle
from deploy_prune.errors import BundleError, DeployPruneError, InputError, MissingExtraError
from deploy_prune.export import Options, export_bundle
from deploy_prune.heads import Head
from deploy_prune.serve import Predictor, load
from deploy_prune.serve.answers import ANSWER_TOKENS, best_span, softmax
from deploy_prune.serve.loader import BATCH_ROWS

HEADS = ["classification", "regression", "token", "qa", "embedding"]
TEXTS = ["a fine film", "dull, dull plot!", "", "music of x1 and more of it"]
PAIRS = [("who?", "a warm scene of paris"), ("what is it", "joke"), ("when", "it was cold, then quick and bright")]
LIMITS = {"bert": 66, "roberta": 64}  # two of RoBERTa's 66 positions are never used

Made = Callable[..., tuple[Path, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that gives an exported bundle of a head and family, and its torch model; each is made once."""

    @cache
    def make(kind: str, family: str = "bert", format: str = "onnx", options: Options | None = None) -> tuple[Path, Any]:
        bundle, models = make_bundle(tmp_path_factory.mktemp("serve") / "bundle", family, kind)
        exported = export_bundle(
            bundle, formats=[format], variants=["sliced"], models=models, options=options or Options()
        )
        exported.check()
        bundle.commit()
        return bundle.root, models["sliced"]

    return make


def samples(kind: str) -> list[Any]:
    return list(PAIRS if kind == "qa" else TEXTS)


def expect(root: Path, model: Any, kind: str, texts: list[Any], family: str = "bert") -> tuple[Any, Any]:
    """Return transformers' encoding of the texts and the torch model's outputs on it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "sliced")
    parts = list(zip(*texts, strict=True)) if kind == "qa" else [texts]
    encoding = tokenizer(
        *map(list, parts), padding=True, truncation=True, max_length=LIMITS[family], return_tensors="np"
    )
    inputs = {name: np.asarray(encoding[name], dtype=np.int64) for name in input_names(family)}
    return encoding, run_torch(model, Head(kind), inputs)  # type: ignore[arg-type]


def assert_outputs(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], kind: str, encoding: Any) -> None:
    assert set(got) == set(wanted)
    real = encoding["attention_mask"].astype(bool)
    for name, array in wanted.items():
        assert got[name].shape == array.shape
        pick = real if kind in ("token", "qa") else slice(None)
        np.testing.assert_allclose(got[name][pick], array[pick], atol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
def test_outputs_are_those_of_the_torch_model(made: Made, kind: str) -> None:
    root, model = made(kind)
    encoding, wanted = expect(root, model, kind, samples(kind))
    with load(root, threads=1) as predictor:
        assert_outputs(predictor.outputs(samples(kind)), wanted, kind, encoding)


def test_other_runtimes_give_the_same(made: Made) -> None:
    pytest.importorskip("openvino")
    root, model = made("classification", format="openvino")
    encoding, wanted = expect(root, model, "classification", TEXTS)
    for runtime in ("openvino", "torch"):
        with load(root, runtime, threads=1) as predictor:
            assert_outputs(predictor.outputs(TEXTS), wanted, "classification", encoding)


def test_classes(made: Made) -> None:
    root, model = made("classification")
    _, wanted = expect(root, model, "classification", TEXTS)
    with load(root, threads=1) as predictor:
        answers = predictor(TEXTS)
    for answer, p in zip(answers, softmax(wanted["logits"]), strict=True):
        assert answer["label"] == ("no", "yes")[p.argmax()]
        assert answer["score"] == pytest.approx(p.max(), abs=1e-4)
        assert answer["scores"] == pytest.approx({"no": p[0], "yes": p[1]}, abs=1e-4)
        json.dumps(answer)


def test_values(made: Made) -> None:
    root, model = made("regression")
    _, wanted = expect(root, model, "regression", TEXTS)
    with load(root, threads=1) as predictor:
        answers = predictor(TEXTS)
    assert [a["value"] for a in answers] == pytest.approx(wanted["logits"][:, 0].tolist(), abs=1e-4)
    assert all(type(a["value"]) is float for a in answers)


def test_tokens(made: Made) -> None:
    root, model = made("token")
    encoding, wanted = expect(root, model, "token", TEXTS)
    with load(root, threads=1) as predictor:
        answers = predictor(TEXTS)
    assert answers[2] == []
    for row, (text, tokens) in enumerate(zip(TEXTS, answers, strict=True)):
        positions = [i for i, word in enumerate(encoding.word_ids(row)) if word is not None]
        for token, i in zip(tokens, positions, strict=True):
            p = softmax(wanted["logits"][row, i])
            assert token["label"] == f"LABEL_{p.argmax()}"  # the manifest names two labels, the model has three
            assert token["score"] == pytest.approx(p.max(), abs=1e-4)
            assert token["word"] == text[token["start"] : token["end"]]
        assert "".join(t["word"] for t in tokens) == text.replace(" ", "")
        json.dumps(tokens)


def test_answers_to_questions(made: Made) -> None:
    root, model = made("qa")
    encoding, wanted = expect(root, model, "qa", PAIRS)
    with load(root, threads=1) as predictor:
        answers = predictor(PAIRS)
        assert predictor([("who?", "")]) == [{"answer": "", "start": 0, "end": 0, "score": 0.0}]
    for row, ((_, context), answer) in enumerate(zip(PAIRS, answers, strict=True)):
        inside = [i for i, s in enumerate(encoding.sequence_ids(row)) if s == 1]
        start, end = (wanted[name][row, inside] for name in ("start_logits", "end_logits"))
        score, first, last = brute_force(start, end)
        assert answer["score"] == pytest.approx(score, abs=1e-4)
        assert answer["start"] == encoding[row].offsets[inside[first]][0]
        assert answer["end"] == encoding[row].offsets[inside[last]][1]
        assert answer["answer"] == context[answer["start"] : answer["end"]] != ""
        json.dumps(answer)


def test_embeddings(made: Made) -> None:
    root, model = made("embedding")
    _, wanted = expect(root, model, "embedding", TEXTS)
    with load(root, threads=1) as predictor:
        answers = predictor(TEXTS)
    np.testing.assert_allclose(np.stack([a["embedding"] for a in answers]), wanted["embedding"], atol=1e-4)


def brute_force(start: np.ndarray, end: np.ndarray) -> tuple[float, int, int]:
    p, q = softmax(start), softmax(end)
    spans = [(i, j) for i in range(len(p)) for j in range(i, min(len(q), i + ANSWER_TOKENS))]
    first, last = max(spans, key=lambda span: float(start[span[0]]) + float(end[span[1]]))
    return float(p[first] * q[last]), first, last


logits = st.lists(st.integers(-9, 9), min_size=1, max_size=80)


@given(logits, st.randoms(use_true_random=False))
def test_best_span(values: list[int], random: Any) -> None:
    start = np.array(values, np.float32)
    end = np.array([random.randint(-9, 9) for _ in values], np.float32)
    score, first, last = best_span(start, end)
    wanted = brute_force(start, end)
    assert start[first] + end[last] == start[wanted[1]] + end[wanted[2]]
    assert score == pytest.approx(softmax(start)[first] * softmax(end)[last])
    assert 0 <= last - first < ANSWER_TOKENS


@pytest.mark.parametrize("kind", HEADS)
def test_neighbours_do_not_change_an_answer(made: Made, kind: str) -> None:
    texts = samples(kind)
    with load(made(kind)[0], threads=1) as predictor:
        together, alone = predictor(texts), [predictor([text])[0] for text in texts]
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b)


def assert_close(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert set(a) == set(b)
        for key in a:
            assert_close(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, str):
        assert a == b
    else:
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "family"), [("classification", "bert"), ("qa", "bert"), ("token", "bert"), ("embedding", "roberta")]
)
def test_long_texts_are_cut(made: Made, kind: str, family: str) -> None:
    root, model = made(kind, family)
    long = " ".join(["film"] * 60)  # the tiny tokenizer spells: 240 tokens
    texts = [("who?", long), ("what", "joke")] if kind == "qa" else [long, "joke"]
    encoding, wanted = expect(root, model, kind, texts, family)
    assert encoding["input_ids"].shape == (2, LIMITS[family])
    with load(root, threads=1) as predictor:
        assert_outputs(predictor.outputs(texts), wanted, kind, encoding)
        assert len(predictor(texts)) == 2


def test_long_questions_leave_no_error(made: Made) -> None:
    with load(made("qa")[0], threads=1) as predictor:
        (answer,) = predictor([("who " * 80, "a warm scene " * 80)])
    assert answer["answer"]


def test_the_tokenizers_own_limit_holds(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    rewrite(bundle, "tokenizer_config.json", model_max_length=10)
    with load(bundle.root, threads=1) as predictor:
        assert predictor.preparation.tokenizer.encode("film " * 20).ids[-1] == 3
        assert len(predictor.preparation.tokenizer.encode("film " * 20).ids) == 10


def test_a_file_of_one_shape_takes_any_texts(made: Made) -> None:
    root, model = made("classification", options=Options(shape=(2, 12)))
    texts = [*TEXTS, "a film " * 30]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "sliced")
    encoding = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="np")
    wanted = run_torch(model, Head("classification"), {n: encoding[n] for n in input_names("bert")})
    with load(root, threads=1) as predictor:
        assert_outputs(predictor.outputs(texts), wanted, "classification", encoding)
        assert predictor("joke")[0]["scores"].keys() == {"no", "yes"}


def test_order_of_many_texts(made: Made) -> None:
    texts = [f"film {i}" for i in range(BATCH_ROWS + 3)]
    with load(made("regression")[0], threads=1) as predictor:
        values = [a["value"] for a in predictor(texts)]
        whole = predictor.outputs(texts)["logits"][:, 0]
    assert values == pytest.approx(whole.tolist(), abs=1e-5)


def test_one_text_and_none(made: Made) -> None:
    with load(made("classification")[0], threads=1) as predictor:
        assert predictor("joke") == predictor(["joke"])
        assert predictor([]) == []
        assert predictor.outputs([]) == {}
        (pair,) = predictor([("a film", "a plot")])
        listed: list[Any] = [["a film", "a plot"]]  # as JSON has it
        assert predictor(listed) == [pair] != predictor(["a film"])


def test_infer_takes_tensors(made: Made) -> None:
    root, _ = made("classification")
    case = Bundle.open(root).golden()[2]
    with load(root, threads=1) as predictor:
        got = predictor.infer(case.inputs)
        np.testing.assert_allclose(got["logits"], case.outputs["sliced"]["logits"], atol=1e-4)
        with pytest.raises(InputError, match="Missing inputs"):
            predictor.infer({})
        with pytest.raises(InputError, match="cannot be run on these inputs"):  # ids that the table has no rows for
            predictor.infer({name: np.full_like(array, 10**6) for name, array in case.inputs.items()})


def test_labels(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    assert set(scores(bundle)) == {"no", "yes"}
    bundle.manifest.task["labels"] = []
    bundle.commit()
    assert set(scores(bundle)) == {"LABEL_0", "LABEL_1"}
    rewrite(bundle, "config.json", id2label={"0": "bad", "1": "good"})
    assert set(scores(bundle)) == {"bad", "good"}


def scores(bundle: Bundle) -> dict[str, float]:
    with load(bundle.root, threads=1) as predictor:
        return predictor("a fine film")[0]["scores"]


def rewrite(bundle: Bundle, name: str, **values: Any) -> None:
    path = bundle.path(f"sliced/{name}")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    bundle.register(f"sliced/{name}")
    bundle.commit()


@pytest.mark.parametrize(
    ("kind", "texts", "words"),
    [
        ("classification", ["fine", 3], "Text 1 is int, neither a string nor a pair"),
        ("classification", ["fine", None], "Text 1 is NoneType"),
        ("classification", [("a", "b", "c")], "Text 0 is tuple"),
        ("classification", [("a", 2)], "Text 0 holds int"),
        ("classification", 7, "Texts are expected, not int"),
        ("classification", ["half \ud800"], "Text 0 holds half of a surrogate pair"),
        ("qa", ["who?"], r"(?s)Text 0 is a single string.*\[\(question, context\)"),
        ("qa", ("who?", "a film"), "Text 0 is a single string"),
        ("token", [("a", "b")], "Text 0 is a pair"),
    ],
)
def test_what_is_no_text_is_refused(made: Made, kind: str, texts: Any, words: str) -> None:
    with load(made(kind)[0], threads=1) as predictor, pytest.raises(InputError, match=words):
        predictor(texts)


def test_closed(made: Made) -> None:
    predictor = load(made("classification")[0], threads=1)
    with predictor:
        predictor("joke")
    predictor.close()
    calls: list[Callable[[Predictor], Any]] = [lambda p: p("a"), lambda p: p.infer({}), lambda p: p.__enter__()]
    for call in calls:
        with pytest.raises(InputError, match=r"(?s)closed.*Load the bundle again"):
            call(predictor)


def test_unusable_options_are_refused(made: Made) -> None:
    root, _ = made("classification")
    for options, words in (
        ({"runtime": "tvm"}, r"(?s)No runtime 'tvm'.*ort-cpu"),
        ({"variant": "thin"}, "No variant 'thin'"),
        ({"threads": 0}, "0 threads"),
        ({"threads": 1.5}, "1.5 threads"),
        ({"threads": 100_000}, "from 1 to 1024"),
        ({"precision": "fp64"}, "No precision 'fp64'"),
        ({"variant": "dense"}, r"(?s)no fp32 onnx file of the dense model.*deploy-prune export"),
        ({"precision": "int8"}, "no int8 onnx file"),
    ):
        with pytest.raises(InputError, match=words):
            load(root, **options)


def test_unusable_bundles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No bundle"):
        load(tmp_path / "nothing")
    bundle = exported_bundle(tmp_path)
    path = bundle.path("sliced/tokenizer.json")
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json in the bundle .* is corrupted"):
        load(bundle.root)
    bundle.register("sliced/tokenizer.json")
    bundle.commit()
    with pytest.raises(BundleError, match="Cannot read the tokenizer"):
        load(bundle.root)
    del bundle.manifest.files["sliced/tokenizer.json"]
    bundle.commit()
    with pytest.raises(BundleError, match=r"(?s)no sliced/tokenizer\.json.*make the bundle again"):
        load(bundle.root)


def test_a_runtime_that_is_not_installed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"deploy-prune\[edge\]"):
        load(made("classification")[0])


def test_every_error_says_how_to_mend_it(made: Made) -> None:
    root, _ = made("classification")
    for options in ({"runtime": "tvm"}, {"variant": "thin"}, {"threads": -1}, {"precision": "fp8"}):
        with pytest.raises(DeployPruneError) as caught:
            load(root, **options)
        assert caught.value.hint
