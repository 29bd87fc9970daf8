"""A KServe InferenceService that serves a bundle by this package's own server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...bundle import Bundle, Variant
from ...disk import disk_errors, write_atomically
from ...errors import InputError
from ...runtimes.base import find_artifact

MOUNT = "/mnt/models"  # where KServe puts what storageUri names
PORT, GRPC_PORT = 8080, 8081


def inference_service(
    bundle: Bundle,
    *,
    image: str,
    storage: str,
    name: str | None = None,
    variant: Variant = "sliced",
    precision: str = "fp32",
    cpus: str = "2",
    memory: str = "1Gi",
) -> dict[str, Any]:
    """Return the manifest.

    Raises InputError where the bundle lacks the file, the name is none for Kubernetes, or the storage no URI.
    """
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://\S+", storage):
        raise InputError(f"{storage!r} is no URI that KServe loads from.", hint="Give --storage as s3://bucket/bundle.")
    name = (name or bundle.root.resolve().name).lower().replace("_", "-").replace(".", "-")
    if not name or len(name) > 63 or not all(c.isalnum() or c == "-" for c in name) or "-" in (name[0], name[-1]):
        raise InputError(f"{name!r} is no name for Kubernetes.", hint="Use lower-case letters, digits and '-'.")
    find_artifact(bundle, variant, "onnx", precision)
    # In its container, where the platform decides who reaches it.
    where = ["--host", "0.0.0.0", "--port", str(PORT), "--grpc-port", str(GRPC_PORT)]  # nosec B104
    resources = {"cpu": cpus, "memory": memory}
    container = {
        "name": "kserve-container",
        "image": image,
        "args": [f"{name}={MOUNT}", "--variant", variant, "--precision", precision, *where],
        "env": [{"name": "STORAGE_URI", "value": storage}],
        "ports": [{"containerPort": PORT, "name": "http1", "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": PORT}, "periodSeconds": 2},
        "livenessProbe": {"httpGet": {"path": "/v2/health/live", "port": PORT}, "periodSeconds": 10},
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "readOnlyRootFilesystem": True},
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": {"deploy-prune/plan": str(bundle.manifest.plan.get("hash"))}},
        "spec": {"predictor": {"minReplicas": 1, "containers": [container]}},
    }


def write_kserve(bundle: Bundle, path: Path, **options: Any) -> Path:
    """Write the manifest as YAML; the options are those of `inference_service`."""
    import yaml

    manifest = inference_service(bundle, **options)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, yaml.safe_dump(manifest, sort_keys=False))
    return path
