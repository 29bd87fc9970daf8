"""Models of the server by version: loaded and warmed before they answer, closed with nothing lost and nothing left."""

from __future__ import annotations

import asyncio
import errno
import gc
import shutil
import threading
import time
import urllib.error
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles_tiny import tiny_inputs

pytest.importorskip("tritonclient", reason="the extra 'serve' is not installed")
from servers_tiny import GOOD, PATH, ask, calling, client_of, infer, running, wait_until
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from deploy_prune.bundle import Bundle
from deploy_prune.cli_serve import named
from deploy_prune.errors import InputError, SystemStateError
from deploy_prune.serve import load
from deploy_prune.serve.loader import Predictor
from deploy_prune.server.engine import Engine
from deploy_prune.server.models import Models
from deploy_prune.server.run import Server
from deploy_prune.server.versions import WARM_ROWS, Serving

TEXT = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a fine film"]}]}
LOAD = "/v2/repository/models/m/load"


@pytest.fixture(scope="module")
def made(root: Path) -> Path:
    return root


def test_a_model_is_not_ready_before_it_is_warm(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, rows, real_infer = threading.Event(), [], Predictor.infer

    def infer(self: Predictor, feeds: Any) -> Any:
        assert go.wait(60)
        rows.append(len(feeds["input_ids"]))
        return real_infer(self, feeds)

    def answers(server: Server) -> bool:
        try:
            return ask(server, "/v2/health/live")[0] == 200
        except urllib.error.URLError:
            return False

    monkeypatch.setattr(Predictor, "infer", infer)
    with running({"m": made}, loaded=False) as server:
        try:
            wait_until(lambda: answers(server))
            assert ask(server, "/v2/health/live") == (200, {"live": True})
            assert ask(server, "/v2/health/ready") == (503, {"ready": False})
            assert ask(server, "/v2/models/m/ready") == (503, {"name": "m", "ready": False})
            assert ask(server, "/v2/models/m.answers/infer", TEXT)[0] == 503
            assert ask(server, "/v2/repository/index", {})[1][0]["state"] == "UNAVAILABLE"
            with client_of(server, "grpc") as (client, _):
                assert not client.is_server_ready()
                assert not client.is_model_ready("m")
            assert rows == []
        finally:
            go.set()
        wait_until(lambda: ask(server, "/v2/health/ready")[0] == 200)
        assert rows == list(WARM_ROWS)
        with client_of(server, "grpc") as (client, _):
            assert client.is_server_ready()


def test_closed_versions_leave_nothing_behind(made: Path) -> None:
    feeds = {n: np.ones((1, 3), np.int64) for n in ("input_ids", "attention_mask")}
    feeds["token_type_ids"] = np.zeros((1, 3), np.int64)

    async def main() -> tuple[list[Any], list[str]]:
        models, closed = Models(Serving(threads=1)), []
        engine = Engine(models)
        models.add("m", made)
        for _ in range(2):
            version = await models.load("m")
            await version.infer(feeds)
            closed.append(weakref.ref(version))
            del version
            assert 'deploy_prune_run_rows_count{model="m",version="1"} 1.0' in engine.metrics.text().decode()
            await models.unload("m")
        gc.collect()
        return [reference() for reference in closed], engine.metrics.text().decode().splitlines()

    alive, lines = asyncio.run(main())
    assert alive == [None, None]
    assert [line for line in lines if 'version="' in line] == []


def test_a_version_that_goes_answers_what_it_has_begun(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, prepare = threading.Event(), threading.Event(), Predictor.prepare

    def slow(self: Predictor, rows: Any, first: int = 0) -> Any:
        begun.set()
        assert go.wait(60)
        return prepare(self, rows, first)

    shutil.copytree(made, tmp_path / "1")
    with running({"m": tmp_path}) as server, ThreadPoolExecutor(2) as pool:
        try:
            monkeypatch.setattr(Predictor, "prepare", slow)
            asked = pool.submit(ask, server, "/v2/models/m.answers/infer", TEXT)
            assert begun.wait(30)
            shutil.copytree(made, tmp_path / "2")
            assert ask(server, LOAD, {})[1]["version"] == "2"
            shutil.copytree(made, tmp_path / "3")
            loading = pool.submit(ask, server, LOAD, {})  # ends when version 1 is closed
            wait_until(lambda: ask(server, "/v2/models/m")[1]["versions"] == ["2", "3"])
            time.sleep(0.2)
        finally:
            go.set()
        status, said = asked.result(60)
        assert (status, said.get("model_version")) == (200, "1"), said
        assert loading.result(60) == (200, {"name": "m", "version": "3"})


def test_metadata_is_of_the_open_version_whatever_lies_on_disk(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "bundle"
    shutil.copytree(made, root)
    with running({"m": root}) as server:
        before = ask(server, "/v2/models/m")
        assert before[0] == 200
        assert before[1]["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 2]}]
        shutil.rmtree(root / "golden")
        assert ask(server, "/v2/models/m") == before


def test_a_newer_version_takes_over_and_goes_back(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(made, root / "1")
    with (
        running({"m": root}) as server,
        client_of(server, "http") as (client, _),
        client_of(server, "grpc") as (other, _),
    ):
        assert ask(server, PATH, GOOD)[1]["model_version"] == "1"
        shutil.copytree(made, root / "2")
        client.load_model("m")
        assert ask(server, PATH, GOOD)[1]["model_version"] == "2"
        assert ask(server, "/v2/models/m/versions/1/infer", GOOD)[1]["model_version"] == "1"
        status, document = ask(server, LOAD, {"parameters": {"version": "1"}})
        assert (status, document["version"]) == (200, "1")
        assert ask(server, PATH, GOOD)[1]["model_version"] == "1"
        (root / "3").mkdir()
        (root / "3" / "manifest.json").write_text("{}")
        status, document = ask(server, LOAD, {})
        assert (status, "log says why" in document["error"]) == (500, True)  # no fault of the client's
        assert str(tmp_path) not in document["error"]
        with pytest.raises(InferenceServerException, match="FAILED_PRECONDITION") as raised:
            other.load_model("m")
        assert str(tmp_path) not in str(raised.value)
        assert ask(server, PATH, GOOD)[1]["model_version"] == "1"
        client.unload_model("m")
        assert not client.is_model_ready("m")
        assert not client.is_server_ready()


@pytest.mark.parametrize("single", [False, True], ids=["folder", "in place"])
def test_polling_takes_up_what_is_new(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    monkeypatch.setattr("deploy_prune.server.run.POLL", 0.1)
    root = tmp_path / "models"
    shutil.copytree(made, root if single else root / "1")
    with running({"m": root}, poll=True) as server:
        assert ask(server, PATH, GOOD)[1]["model_version"] == "1"
        if single:
            replaced = Bundle.open(root)
            replaced.manifest.task["labels"] = ["bad", "good"]
            replaced.commit()
        else:
            shutil.copytree(made, tmp_path / "new")
            (tmp_path / "new").rename(root / "2")
        until = time.monotonic() + 30
        while ask(server, PATH, GOOD)[1]["model_version"] != "2":
            assert time.monotonic() < until
        status, said = ask(server, LOAD, {"parameters": {"version": "1"}})
        assert (status, said.get("version")) == (200, "1")
        time.sleep(0.5)  # several looks: what was gone back from is not new
        assert ask(server, PATH, GOOD)[1]["model_version"] == "1"


def test_reloads_lose_no_request(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(made, root / "1")
    given = tiny_inputs(["input_ids", "attention_mask", "token_type_ids"], 2, 4)
    with load(made, threads=1) as predictor:
        wanted = predictor.infer(given)["logits"]
    with running({"m": root}) as server:
        stop, wrong, count = threading.Event(), [], [0]

        def ask_on() -> None:
            with client_of(server, "grpc") as (client, module):
                while not stop.is_set():
                    try:
                        if not np.allclose(infer(client, module, "m", given).as_numpy("logits"), wanted, atol=1e-5):
                            wrong.append("another answer")
                        count[0] += 1
                    except InferenceServerException as error:
                        wrong.append(str(error))

        threads = [threading.Thread(target=ask_on) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in (2, 3, 4):
            shutil.copytree(made, root / str(number))
            assert ask(server, LOAD, {})[1]["version"] == str(number)
        stop.set()
        for thread in threads:
            thread.join()
        assert ask(server, "/v2/repository/index", {})[1] == [
            {"name": "m", "version": "3", "state": "AVAILABLE", "reason": ""},
            {"name": "m", "version": "4", "state": "READY", "reason": ""},
        ]
    assert wrong == []
    assert count[0] > 10


@pytest.mark.parametrize("single", [False, True], ids=["folder", "in place"])
def test_polling_does_not_load_what_was_unloaded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    monkeypatch.setattr("deploy_prune.server.run.POLL", 0.05)
    root = tmp_path / "models"
    shutil.copytree(made, root if single else root / "1")
    with running({"m": root}, poll=True) as server:
        assert ask(server, "/v2/repository/models/m/unload", {})[0] == 200
        time.sleep(0.5)  # several looks
        assert ask(server, "/v2/models/m/ready")[0] == 503
        assert ask(server, LOAD, {}) == (200, {"name": "m", "version": "1"})
        assert ask(server, "/v2/repository/models/m/unload", {})[0] == 200
        if single:
            replaced = Bundle.open(root)
            replaced.manifest.task["labels"] = ["bad", "good"]
            replaced.commit()
        else:
            shutil.copytree(made, tmp_path / "new")
            (tmp_path / "new").rename(root / "2")
        wait_until(lambda: ask(server, "/v2/models/m/ready")[0] == 200)  # that one is new
        assert ask(server, "/v2/models/m.answers/infer", TEXT)[1]["model_version"] == "2"


@pytest.mark.parametrize("change", ["load", "unload"])
def test_what_a_client_has_begun_and_cancels_is_closed_all_the_same(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    begun, go, prepare = threading.Event(), threading.Event(), Predictor.prepare

    def slow(self: Predictor, rows: Any, first: int = 0) -> Any:
        begun.set()
        assert go.wait(60)
        return prepare(self, rows, first)

    def watched(server: Server) -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as response:
            return 'deploy_prune_waiting_rows{model="m",version="1"}' in response.read().decode()

    def versions(server: Server) -> list[str]:
        return [entry["version"] for entry in ask(server, "/v2/repository/index", {})[1]]

    for number in ("1", "2") if change == "load" else ("1",):
        shutil.copytree(made, tmp_path / number)
    asked = f"RepositoryModel{change.capitalize()}"
    with running({"m": tmp_path}) as server, ThreadPoolExecutor(1) as pool, calling(server, asked) as call:
        try:
            if change == "load":
                assert ask(server, LOAD, {"parameters": {"version": "1"}})[0] == 200
            monkeypatch.setattr(Predictor, "prepare", slow)
            pool.submit(ask, server, "/v2/models/m.answers/infer", TEXT)
            assert begun.wait(30)
            if change == "load":
                assert ask(server, LOAD, {})[1]["version"] == "2"
                shutil.copytree(made, tmp_path / "3")
            going = call.future(getattr(pb, f"{asked}Request")(model_name="m").SerializeToString())  # type: ignore[attr-defined]
            wait_until(lambda: versions(server) == (["2", "3"] if change == "load" else [""]))
            going.cancel()
            time.sleep(0.3)  # until the server has heard of it
            assert watched(server)  # version 1 still answers
        finally:
            go.set()
        wait_until(lambda: not watched(server))


def test_what_the_disk_does_not_give_is_told_as_no_fault_of_the_client(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    shutil.copytree(made, tmp_path / "1")
    with running({"m": tmp_path}) as server, client_of(server, "grpc") as (client, _):
        shutil.copytree(made, tmp_path / "2")
        with monkeypatch.context() as patch:
            patch.setattr("deploy_prune.server.versions.sha256_file", unreadable)
            status, said = ask(server, LOAD, {})
            assert (status, said["error"]) == (500, "m cannot be loaded: the server's log says why.")
            with pytest.raises(InferenceServerException, match="FAILED_PRECONDITION"):
                client.load_model("m")
        shutil.rmtree(tmp_path / "1")
        shutil.rmtree(tmp_path / "2")
        status, said = ask(server, LOAD, {})
        assert (status, said["error"]) == (404, "There is no bundle of m any more.")
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            client.load_model("m")
        assert ask(server)[1]["model_version"] == "1"  # what was open answers


def test_a_server_that_cannot_read_a_bundle_says_so_at_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(made / "sliced"))

    monkeypatch.setattr("deploy_prune.server.versions.open_bundle", broken)
    with pytest.raises(SystemStateError, match="sliced cannot be read: Input/output error"), running({"m": made}):
        pass


@pytest.mark.parametrize(
    ("name", "said"),
    [("x.v1", "NAME=PATH: model=.*x.v1"), ("new.onnx", "is a file.\n.*folder of a bundle"), ("none", "No bundle at")],
)
def test_what_cannot_be_served_is_told_how_to_name_it(made: Path, tmp_path: Path, name: str, said: str) -> None:
    shutil.copytree(made, tmp_path / "x.v1")
    (tmp_path / "new.onnx").write_bytes(b"a model")
    sources = named([str(tmp_path / name)])
    with pytest.raises(InputError, match=said):
        Models(Serving()).add(*sources.popitem())
