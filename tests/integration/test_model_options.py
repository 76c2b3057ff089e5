"""Options of a model reach the library's constructor, and what would run a stranger's code is off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import tiny_models

import legit_worker
from legit_worker.errors import ModelLoadError, SettingsError
from legit_worker.models.handle import use
from legit_worker.models.registry import default_registry
from legit_worker.settings import load
from legit_worker.testing import use_models

COMMIT = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"


def loaded(**variables: str) -> Any:
    return load({f"LEGIT_WORKER_MODELS__M__{name}": value for name, value in variables.items()}).models["m"]


def test_options_of_the_library_are_json() -> None:
    model = loaded(PATH="x", MODEL_KWARGS='{"attn_implementation": "eager"}', PROCESSOR_KWARGS='{"use_fast": true}')
    assert model.model_kwargs == {"attn_implementation": "eager"}
    assert model.processor_kwargs == {"use_fast": True}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MODEL_KWARGS": '{"dtype": "float16"}'}, "dtype is not taken from here: set DTYPE"),
        ({"MODEL_KWARGS": '{"device_map": "auto"}'}, "device_map is not taken from here: LEGIT_WORKER_DEVICE says"),
        ({"MODEL_KWARGS": '{"token": "t"}'}, "token is not taken from here: set HF_TOKEN"),
        ({"MODEL_KWARGS": "eager"}, "MODEL_KWARGS"),
        ({"PROCESSOR_KWARGS": '{"trust_remote_code": true}'}, "PROCESSOR_KWARGS.*: set TRUST_REMOTE_CODE"),
        ({"PROCESSOR_KWARGS": '{"revision": "main"}'}, "revision is not taken from here: set REVISION"),
        ({"PROCESSOR_KWARGS": '{"code_revision": "main"}'}, "code_revision is not taken .*: REVISION pins the code"),
        ({"PROCESSOR_KWARGS": '{"local_files_only": false}'}, "is not taken from here: set LOCAL_FILES_ONLY"),
        ({"PROCESSOR_KWARGS": '{"cache_dir": "/tmp"}'}, "cache_dir is not taken from here: set HF_HOME"),
        ({"TRUST_REMOTE_CODE": "1"}, "only if REVISION is a commit, 40 hex digits"),
        ({"TRUST_REMOTE_CODE": "1", "REVISION": "main"}, "only if REVISION is a commit, 40 hex digits"),
        ({"PROMPT": "a: ", "PROMPT_NAME": "a"}, "PROMPT or PROMPT_NAME, not both"),
        ({"DIMENSIONS": "0"}, "greater than or equal to 1"),
        ({"TASK": "title"}, "'query' or 'document'"),
        ({"KIND": "rerank", "DIMENSIONS": "8"}, "kind 'rerank' has no dimensions: only embed, image have"),
        ({"KIND": "rerank", "TASK": "query"}, "kind 'rerank' has no task"),
        ({"KIND": "simulated", "PROMPT": "a: "}, "kind 'simulated' has no prompt"),
    ],
)
def test_options_that_make_no_sense_stop_the_worker(variables: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        loaded(**{"PATH": "some/model", **variables})


def test_code_of_a_pinned_commit_may_run() -> None:
    assert loaded(PATH="some/model", TRUST_REMOTE_CODE="1", REVISION=COMMIT).trust_remote_code


def test_a_folder_that_only_the_worker_has_needs_no_commit() -> None:
    assert loaded(PATH="/no/such/folder", TRUST_REMOTE_CODE="1").trust_remote_code


def test_options_reach_the_library(tiny_paths: dict[str, Path]) -> None:
    spec = {
        "path": str(tiny_paths["embed"]),
        "model_kwargs": {"attn_implementation": "eager"},
        "processor_kwargs": {"model_max_length": 7},
    }
    with use_models({"m": spec, "plain": {"path": spec["path"]}}) as registry:
        handle = legit_worker.model("m")
        assert handle.max_seq_length == 7
        assert len(registry.slots) == 2  # other options, other weights
        with use(handle.slot, default_registry().residency) as model:
            assert model.model._model[0].model.config._attn_implementation == "eager"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last module is code in its own folder."""
    path = tiny_models.build_dense(tmp_path_factory.mktemp("foreign"))
    modules = json.loads((path / "modules.json").read_text())
    modules.append({"idx": 2, "name": "2", "path": "", "type": "foreign.Doubling"})
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "foreign.py").write_text(
        "import torch\n\n\nclass Doubling(torch.nn.Module):\n"
        "    def forward(self, features):\n"
        "        features['sentence_embedding'] = 2 * features['sentence_embedding']\n"
        "        return features\n\n"
        "    @classmethod\n"
        "    def load(cls, *args, **kwargs):\n"
        "        return cls()\n\n"
        "    def save(self, *args, **kwargs):\n"
        "        pass\n"
    )
    return path


def test_a_strangers_code_runs_only_if_the_operator_says_so(foreign: Path, tmp_path: Path) -> None:
    specs = {"off": {"path": str(foreign)}, "on": {"path": str(foreign), "trust_remote_code": True}}
    plain = sentence_transformers.SentenceTransformer(str(foreign), device="cpu", trust_remote_code=True).encode("red")
    with use_models(specs):
        with pytest.raises(ModelLoadError, match="trust_remote_code"):
            legit_worker.model("off").encode("red")
        assert legit_worker.model("on").encode("red") == pytest.approx(plain, rel=1e-4, abs=1e-5)
