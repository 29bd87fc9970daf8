"""Every runtime gives what the model gives, at every shape, and refuses feeds it cannot take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from bundles_tiny import exported_bundle

from deploy_prune.bundle import VARIANTS, Bundle
from deploy_prune.config import ALLOW_CODE, PROGRAMS
from deploy_prune.errors import InputError, MissingExtraError, SystemStateError
from deploy_prune.runtimes import Runner, available_runtimes, open_runner
from deploy_prune.runtimes.openvino import OpenVinoRunner
from deploy_prune.runtimes.ort import OrtRunner
from deploy_prune.runtimes.torch_program import ProgramRunner


class RunnerContract:
    """Subclass this for a new runtime and name it."""

    runtime = ""
    format = "onnx"

    @pytest.fixture
    def bundle(self, tmp_path: Path) -> Bundle:
        return exported_bundle(tmp_path, self.format)

    def open(self, bundle: Bundle, variant: str = "sliced", **options: int) -> Runner:
        return open_runner(bundle, self.runtime, variant, **options)  # type: ignore[arg-type]

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_matches_the_golden_outputs(self, bundle: Bundle, variant: str) -> None:
        with self.open(bundle, variant, threads=1) as runner:
            assert runner.provider
            for case in bundle.golden():
                got = runner.infer({name: case.inputs[name] for name in runner.input_names})
                assert set(got) == set(runner.output_names) == {"logits"}
                assert got["logits"].dtype == np.float32
                np.testing.assert_allclose(got["logits"], case.outputs[variant]["logits"], atol=1e-5)

    def test_variants_differ(self, bundle: Bundle) -> None:
        case = bundle.golden()[2]
        with self.open(bundle, "dense") as dense, self.open(bundle, "sliced") as sliced:
            difference = dense.infer(case.inputs)["logits"] - sliced.infer(case.inputs)["logits"]
        assert np.abs(difference).max() > 1e-3

    def test_checks_its_feeds(self, bundle: Bundle) -> None:
        good = bundle.golden()[2].inputs
        with self.open(bundle) as runner:
            for feeds, words in (
                ({n: a for n, a in good.items() if n != "attention_mask"}, "Missing inputs: attention_mask"),
                (good | {"labels": good["input_ids"]}, "Unknown inputs: labels"),
                (good | {"input_ids": good["input_ids"].astype(np.int32)}, "int32, expected int64"),
                (good | {"input_ids": good["input_ids"][0]}, r"shape \(13,\), expected \(batch, sequence\)"),
                (good | {"attention_mask": good["attention_mask"][:, :-1]}, "sequence = 13"),
            ):
                with pytest.raises(InputError, match=words):
                    runner.infer(feeds)
            assert runner.infer(good)["logits"].shape == (4, 2)

    def test_is_closed_outside_its_block(self, bundle: Bundle) -> None:
        runner = self.open(bundle)
        inputs = bundle.golden()[0].inputs
        with pytest.raises(InputError, match="not open"):
            runner.infer(inputs)
        with runner:
            runner.infer(inputs)
        with pytest.raises(InputError, match="not open"):
            runner.infer(inputs)


class TestOrtCpu(RunnerContract):
    runtime = "ort-cpu"


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
class TestOpenVino(RunnerContract):
    runtime = format = "openvino"


class TestProgram(RunnerContract):
    runtime = format = "pt2"

    @pytest.fixture(autouse=True)
    def trusted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(ALLOW_CODE, PROGRAMS)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
class TestTorchCompile(RunnerContract):
    runtime = "torch-compile"


class TestTorch(RunnerContract):
    runtime = "torch"

    def test_puts_the_number_of_threads_back(self, bundle: Bundle) -> None:
        import torch

        before = torch.get_num_threads()
        with self.open(bundle, threads=before + 1):
            assert torch.get_num_threads() == before + 1
        assert torch.get_num_threads() == before


def test_unknown_runtime_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There are: openvino, ort-cpu, ort-cuda, ort-tensorrt, pt2, rtx, "):
        open_runner(exported_bundle(tmp_path), "tvm", "dense")
    assert {"ort-cpu", "torch"} <= set(available_runtimes())


def test_missing_artifact_says_how_to_make_it(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    bundle.manifest.artifacts = [a for a in bundle.manifest.artifacts if a.variant != "virtual"]
    with pytest.raises(InputError, match=r"(?s)no fp32 onnx file of the virtual model.*deploy-prune export"):
        open_runner(bundle, "ort-cpu", "virtual")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"this is not a protobuf")
    with pytest.raises(InputError, match="cannot load"), OrtRunner(path):
        pass
    with pytest.raises(InputError, match="No ONNX file"), OrtRunner(tmp_path / "nothing.onnx"):
        pass


def test_other_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"this is neither")
    signature = {"inputs": ["input_ids"], "outputs": ["logits"]}
    with pytest.raises(InputError, match="torch cannot load"), ProgramRunner(path, signature):
        pass
    pytest.importorskip("openvino", reason="openvino is not installed")
    with pytest.raises(InputError, match="OpenVINO cannot load"), OpenVinoRunner(path):
        pass


def test_only_tensorrt_writes_a_compiled_graph(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="writes no EPContext file"):
        OrtRunner(tmp_path / "m.onnx", "cuda", context_file=tmp_path / "c.onnx")


@pytest.mark.parametrize("runtime", ["torch-cuda", "torch-compile-cuda", "torch-graphs-cuda"])
def test_torch_on_a_gpu_says_that_there_is_none(runtime: str, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemStateError, match="no CUDA device"):
        open_runner(exported_bundle(tmp_path), runtime, "sliced")


@pytest.mark.parametrize("runtime", ["ort-cuda", "ort-tensorrt"])
def test_gpu_providers_say_what_they_lack(runtime: str, tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the CUDA provider")
    with (
        pytest.raises(MissingExtraError, match="onnxruntime-gpu"),
        open_runner(exported_bundle(tmp_path), runtime, "sliced"),
    ):
        pass


def test_cuda_never_falls_back_to_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    bundle = exported_bundle(tmp_path)
    path = bundle.path(bundle.manifest.artifacts[0].path)
    available = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in available:
        pytest.skip("this machine has the CUDA provider")
    with pytest.raises(MissingExtraError, match="onnxruntime-gpu"), OrtRunner(path, "cuda"):
        pass
    # onnxruntime-gpu without a GPU lists the provider, warns, and then computes on the CPU.
    listed = ["CUDAExecutionProvider", *available]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda p, o, providers: real(p, o, providers=available))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("libcudnn was not found"))
    with pytest.raises(SystemStateError, match=f"would compute with {available[0]}"), OrtRunner(path, "cuda"):
        pass
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "libcudnn was not found\n")


def test_onnx_runtime_reports_nothing_to_its_makers(tmp_path: Path) -> None:
    """Its packages keep an identifier in the user's cache, and send it; also those that the registry has for Linux."""
    path = Path(exported_bundle(tmp_path).manifest.artifacts[0].path)
    program = "import sys; {} import onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"
    found = {}
    for first in ("", "import deploy_prune;"):
        home = tmp_path / f"home{len(first)}"
        home.mkdir()
        hidden = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
        environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"HOME": str(home)}
        command = [sys.executable, "-c", program.format(first), str(tmp_path / "bundle" / path)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        found[first] = sorted(file.name for file in home.rglob("*") if "onnxruntime" in str(file))
    if not found[""]:
        pytest.skip("this ONNX Runtime keeps nothing even where it is not told to")
    assert found["import deploy_prune;"] == []


def test_ort_needs_no_torch(tmp_path: Path) -> None:
    bundle = exported_bundle(tmp_path)
    code = (
        "import sys; from deploy_prune.bundle import Bundle; from deploy_prune.runtimes import open_runner\n"
        "bundle = Bundle.open(sys.argv[1]); case = bundle.golden()[1]\n"
        "with open_runner(bundle, 'ort-cpu', 'sliced') as r: print(r.infer(case.inputs)['logits'].shape)\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(bundle.root)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "(1, 2)"), done.stderr
