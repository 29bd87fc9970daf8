"""The server of the Open Inference Protocol, asked by the clients that people use."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import make_exported

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
from servers_tiny import ask, client_of, infer, running, wait_until
from tritonclient.utils import InferenceServerException

from deploy_prune.serve import load
from deploy_prune.server.run import Server, log_formatter
from deploy_prune.server.versions import Serving, Version

HEADS = ("classification", "regression", "token", "qa", "embedding")
TEXTS = ["a fine film", "dull, dull plot!", "music of x1 and more of it"]
PAIRS = [("who?", "a warm scene of paris"), ("what is it", "joke"), ("when", "it was cold, then bright")]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for head in HEADS:
        made[head] = make_exported(tmp_path_factory.mktemp("served") / head, kind=head).root
    return made


@pytest.fixture(scope="module")
def server(bundles: dict[str, Path]) -> Iterator[Server]:
    with running(bundles) as started:
        yield started


def url(server: Server, path: str = "") -> str:
    return f"http://127.0.0.1:{server.port}{path}"


def feeds(rows: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(4, 40, (rows, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def expected(root: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with load(root, threads=1) as predictor:
        return predictor.infer(given)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("protocol", ["json", "binary", "grpc"])
def test_raw_tensors(server: Server, bundles: dict[str, Path], head: str, protocol: str) -> None:
    given = feeds()
    how = {} if protocol == "grpc" else {"binary_data": protocol == "binary"}
    with client_of(server, protocol) as (client, module):
        found = infer(client, module, head, given, **how)
    for name, array in expected(bundles[head], given).items():
        assert np.array_equal(found.as_numpy(name), array)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("protocol", ["json", "grpc"])
def test_texts_in_answers_out(server: Server, bundles: dict[str, Path], head: str, protocol: str) -> None:
    texts = PAIRS if head == "qa" else TEXTS
    array = np.array([[t.encode() for t in p] if head == "qa" else p.encode() for p in texts], dtype=object)
    with client_of(server, protocol) as (client, module):
        found = infer(client, module, f"{head}.answers", {"text": array})
    with load(bundles[head], threads=1) as predictor:
        wanted = predictor(texts)
    answers = [json.loads(a) for a in found.as_numpy("answer")]
    for answer, right in zip(answers, wanted, strict=True):
        if head == "classification":
            assert answer["label"] == right["label"]
            assert answer["score"] == pytest.approx(right["score"], abs=1e-6)
        if head == "qa":
            assert answer["answer"] == right["answer"]
        if head == "embedding":
            assert answer["embedding"] == pytest.approx(right["embedding"].tolist(), abs=1e-6)
        if head == "regression":
            assert answer["value"] == pytest.approx(right["value"], abs=1e-6)
        if head == "token":
            assert len(answer) == len(right) > 2
            for word, other in zip(answer, right, strict=True):
                assert word | {"score": 0} == other | {"score": 0}
                assert word["score"] == pytest.approx(other["score"], abs=1e-6)
    if head == "regression":
        assert found.as_numpy("value") == pytest.approx(np.array([w["value"] for w in wanted]), abs=1e-6)
    if head == "classification":
        assert [x.decode() for x in found.as_numpy("label")] == [w["label"] for w in wanted]


def test_metadata_health_and_index(server: Server) -> None:
    with client_of(server, "http") as (http, _), client_of(server, "grpc") as (grpc, _):
        for client in (http, grpc):
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("qa")
            assert client.is_model_ready("qa", "1")
        said = http.get_model_metadata("token")
        assert said["versions"] == ["1"]
        assert {t["name"]: (t["datatype"], t["shape"]) for t in said["inputs"]}["input_ids"] == ("INT64", [-1, -1])
        assert said["outputs"][0]["shape"][:2] == [-1, -1]
        assert grpc.get_model_metadata("token").outputs[0].name == "logits"
        assert grpc.get_model_metadata("qa.answers").inputs[0].datatype == "BYTES"
        assert {m["name"] for m in http.get_model_repository_index()} == set(HEADS)
        assert {m.state for m in grpc.get_model_repository_index().models} == {"READY"}
        assert http.get_server_metadata()["name"] == "deploy_prune"


def test_curl(server: Server) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl on this machine")
    body = json.dumps({"id": "7", "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["good"]}]})
    command = [curl, "-sS", "-d", body, url(server, "/v2/models/classification.answers/infer")]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answer["id"] == "7"
    assert answer["model_version"] == "1"
    assert {o["name"] for o in answer["outputs"]} == {"answer", "label", "score"}


GOOD = {k: {"name": k, "datatype": "INT64", "shape": list(v.shape), "data": v.tolist()} for k, v in feeds().items()}


def changed(name: str, /, **changes: Any) -> dict[str, Any]:
    return {"inputs": [GOOD[k] | (changes if k == name else {}) for k in GOOD]}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (changed("input_ids", datatype="FP32"), 400, "float32"),
        (changed("input_ids", datatype="INT9"), 400, "no datatype"),
        (changed("input_ids", shape=[2, 8]), 400, "14"),
        (changed("input_ids", shape=[-2, 7]), 400, "no shape"),
        (changed("input_ids", shape=[2**40, 2**40]), 413, "elements"),
        (changed("input_ids", data=[[1.5] * 7] * 2), 400, "no INT64"),
        (changed("input_ids", data=[["x"] * 7] * 2), 400, "input_ids"),
        (changed("input_ids", data=[[-1] * 7] * 2), 400, "between 0 and"),
        (changed("input_ids", data=[[10**9] * 7] * 2), 400, "between 0 and"),
        (changed("attention_mask", shape=[1, 14]), 400, "shape"),
        (changed("input_ids", name="other"), 400, "Missing inputs"),
        (changed("input_ids", data=None), 400, "no data"),
        (changed("input_ids", parameters={"binary_data_size": 99}), 400, "beyond"),
        ({"inputs": []}, 400, "inputs"),
        ({}, 400, "inputs"),
        (b"{", 400, "not one of the protocol"),
        (b"\xff\xfe", 400, "not one of the protocol"),
        ({"inputs": [GOOD["input_ids"]] * 2}, 400, "twice"),
        (changed("input_ids") | {"outputs": [{"name": "nothing"}]}, 404, "no output"),
    ],
)
def test_malformed_requests_are_told(server: Server, body: Any, status: int, said: str) -> None:
    found, document = ask(server, "/v2/models/classification/infer", body)
    assert found == status, document
    assert said in document["error"]
    assert "Traceback" not in document["error"]
    assert ask(server, "/v2/models/classification/infer", changed("input_ids"))[0] == 200


def long_text(characters: int) -> dict[str, Any]:
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["good " * (characters // 5)]}]}


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("classification", feeds(1, 67), "Rows of 67 tokens; the model reads 66."),
        ("classification.answers", long_text(70_000), "Text 0 has 70,000 characters; at most 65,536 are taken."),
    ],
)
def test_what_is_longer_than_the_model_reads_is_refused(server: Server, name: str, body: Any, said: str) -> None:
    if name == "classification":
        given, body = body, changed("input_ids")
        for tensor in body["inputs"]:
            tensor |= {"shape": [1, 67], "data": given[tensor["name"]].tolist()}
    else:
        given = {"text": np.array([body["inputs"][0]["data"][0].encode()], dtype=object)}
    status, document = ask(server, f"/v2/models/{name}/infer", body)
    assert (status, said in document["error"]) == (413, True), document
    raised = pytest.raises(InferenceServerException, match="INVALID_ARGUMENT")
    with client_of(server, "grpc") as (client, module), raised:
        infer(client, module, name, given)


def test_texts_beyond_the_models_length_are_cut(server: Server) -> None:
    found = [ask(server, "/v2/models/classification.answers/infer", long_text(n)) for n in (5_000, 60_000)]
    assert [status for status, _ in found] == [200, 200]
    assert found[0][1]["outputs"] == found[1][1]["outputs"]


def test_unknown_models_and_versions(server: Server) -> None:
    assert ask(server, "/v2/models/nobody/infer", changed("input_ids"))[0] == 404
    assert ask(server, "/v2/models/qa/versions/9/infer", changed("input_ids"))[0] == 404
    assert ask(server, "/v2/models/qa/versions/x/infer", changed("input_ids"))[0] == 404
    with client_of(server, "grpc") as (client, module):
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            infer(client, module, "nobody", feeds())
        with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):
            infer(client, module, "qa", {"input_ids": feeds()["input_ids"]})


def test_large_bodies_are_refused(bundles: dict[str, Path]) -> None:
    with running({"m": bundles["classification"]}, most_bytes=2048, grpc_port=None) as server:
        status, document = ask(server, "/v2/models/m/infer", b" " * 4096)
        assert (status, "4,096 bytes" in document["error"]) == (413, True)


def test_requests_share_runs_and_get_their_own_answers(bundles: dict[str, Path]) -> None:
    serving = Serving(threads=1, wait=0.2, most_rows=16)
    given = [feeds(rows=1 + i % 3, tokens=5 + i % 4, seed=i) for i in range(12)]
    with load(bundles["token"], threads=1) as predictor:
        wanted = [predictor.infer(g)["logits"] for g in given]
    with running({"m": bundles["token"]}, serving=serving) as server:
        found: dict[int, np.ndarray] = {}

        def one(number: int) -> None:
            with client_of(server, "grpc") as (client, module):
                found[number] = infer(client, module, "m", given[number]).as_numpy("logits")

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(given))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = metrics_of(server)
    for number, array in enumerate(wanted):
        assert found[number].shape == array.shape
        assert np.abs(found[number] - array).max() <= 1e-5
    runs = float(next(x for x in metrics.splitlines() if x.startswith("deploy_prune_run_rows_count")).split()[-1])
    assert runs < len(given)
    assert 'deploy_prune_requests_total{code="ok",model="m",protocol="grpc"} 12.0' in metrics


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_full_queue_is_said(bundles: dict[str, Path], protocol: str) -> None:
    """Let two rows wait for a third, which leaves no room for two more, and then send it."""
    serving = Serving(threads=1, queue_rows=3, most_rows=3, wait=60.0)
    with running({"m": bundles["classification"]}, serving=serving) as server:

        def one(rows: int) -> str:
            if protocol == "http":
                given = [
                    {"name": n, "shape": [*x.shape], "datatype": "INT64", "data": x.tolist()}
                    for n, x in feeds(rows).items()
                ]
                return str(ask(server, "/v2/models/m/infer", {"inputs": given})[0])
            with client_of(server, "grpc") as (client, module):
                try:
                    infer(client, module, "m", feeds(rows))
                except InferenceServerException as error:
                    return str(error.status())
            return "200"

        with ThreadPoolExecutor(9) as pool:
            first = pool.submit(one, 2)
            wait_until(lambda: waiting(server))
            refused = list(pool.map(one, [2] * 8))
            assert one(1) == "200"
            assert first.result(30) == "200"
        assert refused == [{"http": "503", "grpc": "StatusCode.RESOURCE_EXHAUSTED"}[protocol]] * 8
        metrics = metrics_of(server)
    assert f'deploy_prune_requests_total{{code="busy",model="m",protocol="{protocol}"}} 8.0' in metrics


def test_a_short_drain_is_not_none(bundles: dict[str, Path]) -> None:
    where, serving = {"m": bundles["classification"]}, Serving(threads=1, wait=0.6)
    with running(where, serving=serving, drain_seconds=0.9) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, server, "/v2/models/m/infer", changed("input_ids"))
        wait_until(lambda: waiting(server))
        server.loop.call_soon_threadsafe(server.stop)  # type: ignore[attr-defined]
        assert asked.result(30)[0] == 200


def test_both_protocols_are_drained_in_one_drain(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    async def endless(self: Version, feeds: Any) -> Any:
        begun.append(self)
        await asyncio.sleep(60)

    monkeypatch.setattr(Version, "infer", endless)

    def ask_grpc(server: Server) -> None:
        with client_of(server, "grpc") as (client, module):
            infer(client, module, "m", feeds())

    def ask_http(server: Server) -> None:
        ask(server, "/v2/models/m/infer", changed("input_ids"))

    with running({"m": bundles["classification"]}, drain_seconds=5.0) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(one, server) for one in (ask_grpc, ask_http)]
        wait_until(lambda: len(begun) == 2)
        started = time.monotonic()
        server.loop.call_soon_threadsafe(server.stop)  # type: ignore[attr-defined]
        server.thread.join(30)  # type: ignore[attr-defined]
        assert 4.9 < time.monotonic() - started < 9.9  # one drain, not one after the other
        assert all(a.exception(30) is not None for a in asked)  # cut off


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_waits_is_answered_before_the_end(bundles: dict[str, Path], protocol: str) -> None:
    given = feeds()
    answers: list[Any] = []
    with running({"m": bundles["classification"]}, serving=Serving(threads=1, wait=1.0)) as server:

        def one() -> None:
            if protocol == "grpc":
                with client_of(server, "grpc") as (client, module):
                    answers.append(infer(client, module, "m", given).as_numpy("logits"))
            else:
                answers.append(ask(server, "/v2/models/m/infer", changed("input_ids"))[1]["outputs"][0]["data"])

        thread = threading.Thread(target=one)
        thread.start()
        wait_until(lambda: waiting(server))
    thread.join(30)  # the server has been stopped by now
    assert np.allclose(np.ravel(answers[0]), np.ravel(expected(bundles["classification"], given)["logits"]), atol=1e-5)


def test_sigterm_ends_a_server_without_grpc(bundles: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "deploy_prune", "serve", f"m={bundles['classification']}", "--threads", "1"]
    command += ["--port", "0", "--grpc-port", "-1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any('"message": "ready"' in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, '"message": "stopped"' in said) == (0, True)


def metrics_of(server: Server) -> str:
    with urllib.request.urlopen(url(server, "/metrics")) as response:
        return str(response.read().decode())


def waiting(server: Server) -> bool:
    lines = metrics_of(server).splitlines()
    return any(x.startswith("deploy_prune_waiting_rows{") and float(x.split()[-1]) > 0 for x in lines)


def test_log_lines_have_no_colours() -> None:
    record = logging.makeLogRecord({"msg": "up", "levelname": "INFO", "color_message": "\x1b[36mup", "port": 1})
    said = json.loads(log_formatter().format(record))
    assert {k: said[k] for k in ("message", "level", "port")} == {"message": "up", "level": "INFO", "port": 1}
    assert "color_message" not in said


def test_a_token_is_asked_for(bundles: dict[str, Path]) -> None:
    token = "0123456789abcdef"
    with running({"m": bundles["classification"]}, token=token) as server:
        path = "/v2/models/m/infer"
        assert ask(server, path, changed("input_ids"))[0] == 401
        assert ask(server, path, changed("input_ids"), {"authorization": "Bearer wrong"})[0] == 401
        assert ask(server, path, changed("input_ids"), {"authorization": f"Bearer {token}"})[0] == 200
        with client_of(server, "grpc") as (client, module):
            assert client.is_server_live()
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                infer(client, module, "m", feeds())
            assert client.is_model_ready("m", headers={"authorization": f"Bearer {token}"})


def test_dense_stands_beside_sliced(bundles: dict[str, Path]) -> None:
    with running({"m": bundles["classification"]}, compare=True) as server:
        names = json.loads(urllib.request.urlopen(url(server, "/v2/models")).read())["models"]
        assert names == ["m", "m.answers", "m-dense", "m-dense.answers"]
        answers = [ask(server, f"/v2/models/{n}/infer", changed("input_ids"))[1] for n in ("m", "m-dense")]
        assert answers[0]["outputs"][0]["data"] != answers[1]["outputs"][0]["data"]
