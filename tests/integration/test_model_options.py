"""Options of a model reach the library's constructor, and what would run a stranger's code is off."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import tiny_models
import torch

import legit_worker
from legit_worker import tasks
from legit_worker.errors import InvalidInputError, ModelLoadError, SettingsError
from legit_worker.models import sentence, tokenizing
from legit_worker.models.features import Prompted
from legit_worker.models.handle import forget_calls, last_called, last_computed, use
from legit_worker.models.preparing import LONG
from legit_worker.models.registry import default_registry
from legit_worker.settings import load
from legit_worker.testing import run_together, use_models

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
            assert model.model.library[0].model.config._attn_implementation == "eager"


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


LONG_TEXT = "the cat sat on a mat " * 20


def limited(path: Path, tokens: int) -> Any:
    """The library's own object, told to read so many tokens."""
    library = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    library.max_seq_length = tokens
    return library


def test_a_routers_routes_keep_their_own_limits(tmp_path: Path) -> None:
    path = tiny_models.build_two_lengths(tmp_path, 8, 24)
    plain = sentence_transformers.SentenceTransformer(str(path), device="cpu")
    expected = {"short": limited(path, 4), "whole": plain}
    with use_models({"whole": {"path": str(path)}, "short": {"path": str(path), "max_seq_length": 4}}):
        for alias in ("whole", "short", "whole"):
            for call in ("encode_query", "encode_document"):
                vector = getattr(legit_worker.model(alias), call)(LONG_TEXT)
                right = getattr(expected[alias], call)(LONG_TEXT)
                assert vector == pytest.approx(right, rel=1e-4, abs=1e-5), (alias, call)


def test_a_prompts_length_is_not_that_of_an_alias_that_cuts_it(tmp_path: Path) -> None:
    path = tiny_models.build_dense(tmp_path, include_prompt=False)
    plain = sentence_transformers.SentenceTransformer(str(path), device="cpu").encode(LONG_TEXT, prompt="the old dog ")
    with use_models({"whole": {"path": str(path)}, "short": {"path": str(path), "max_seq_length": 4}}):
        legit_worker.model("short").encode(LONG_TEXT, prompt="the old dog ")
        vector = legit_worker.model("whole").encode(LONG_TEXT, prompt="the old dog ")
    assert vector == pytest.approx(plain, rel=1e-4, abs=1e-5)


def test_a_limit_that_a_model_cannot_have_is_refused(tmp_path: Path, tiny_paths: dict[str, Path]) -> None:
    routed, dense = str(tiny_models.build_routed(tmp_path)), str(tiny_paths["embed"])
    limit = tiny_models.MAX_TOKENS
    specs: dict[str, Any] = {
        "routed": {"path": routed},
        "static": {"path": routed, "max_seq_length": 4},
        "most": {"path": dense, "max_seq_length": limit},
        "beyond": {"path": dense, "max_seq_length": limit + 1},
    }
    with use_models(specs):
        with pytest.raises(ModelLoadError, match="'static' can't have MAX_SEQ_LENGTH=4: its module StaticEmbedding"):
            legit_worker.model("static").encode_document("red")
        with pytest.raises(ModelLoadError, match=f"MAX_SEQ_LENGTH={limit + 1}: it has {limit} positions"):
            legit_worker.model("beyond").encode("red")
        with pytest.raises(InvalidInputError, match="can't have max_seq_length=1000"):
            legit_worker.model("most").encode("red", max_seq_length=1000)
        assert len(legit_worker.model("most").encode(LONG_TEXT)) == 32
        assert len(legit_worker.model("routed").encode_document(LONG_TEXT)) == 32


def test_limits_without_end_leave_few_tokenizers(tiny_paths: dict[str, Path]) -> None:
    library = sentence_transformers.SentenceTransformer(str(tiny_paths["embed"]), device="cpu")
    texts = tokenizing.Tokenizing(library)
    for limit in range(2, 200):
        features = texts.by_short_way(Prompted("red " * 300, None, None, limit))
        assert features is not None
        assert len(features["input_ids"]) == limit
    assert len(texts._ways) <= tokenizing.KNOWN_LIMITS


def test_a_model_of_one_alias_does_not_load_with_a_limit_beyond_its_positions(
    tiny_paths: dict[str, Path],
) -> None:
    limit = tiny_models.MAX_TOKENS
    for kind in ("embed", "rerank", "sparse"):
        spec: dict[str, Any] = {"kind": kind, "path": str(tiny_paths[kind])}
        told = f"could not be loaded: LimitError: MAX_SEQ_LENGTH={limit + 1}: it has {limit} positions"
        with use_models({"m": spec | {"max_seq_length": limit + 1}}), pytest.raises(ModelLoadError, match=told):
            legit_worker.model("m").prompts  # noqa: B018
        with use_models({"m": spec | {"max_seq_length": limit}}):
            assert isinstance(legit_worker.model("m").prompts, dict)


def test_a_batch_is_not_read_up_to_the_limit_of_a_long_text_that_is_read_meanwhile(
    tiny_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentence, "can_be_padded", lambda features: False)  # so `forward` tokenizes
    monkeypatch.setattr(tokenizing, "short_way", lambda model: None)
    path = str(tiny_paths["embed"])
    right = sentence_transformers.SentenceTransformer(path, device="cpu").encode(LONG_TEXT)
    begun, go_on = threading.Event(), threading.Event()
    specs: dict[str, Any] = {"whole": {"path": path}, "short": {"path": path, "max_seq_length": 5}}
    with use_models(specs) as registry, use(registry.get("whole"), registry.residency) as model:
        prepared = model.preprocess(LONG_TEXT)
        library = model.model.library
        preprocess = library.preprocess

        def slow(inputs: list[Any], **options: Any) -> Any:
            if len(str(inputs[0])) > LONG:
                begun.set()
                go_on.wait(10)
            return preprocess(inputs, **options)

        monkeypatch.setattr(library, "preprocess", slow)
        reader = threading.Thread(target=legit_worker.model("short").encode, args=("cat " * LONG,))
        reader.start()
        assert begun.wait(10)
        threading.Timer(0.3, go_on.set).start()
        [output] = model.compute([prepared]).outputs
        reader.join()
    assert output.numpy() == pytest.approx(right, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("spec", "options", "prompt"),
    [
        ({"prompt": "query: "}, {"prompt": "passage: "}, "passage: "),
        ({"prompt_name": "query"}, {"task": "document"}, "document: "),
        ({"task": "query"}, {"task": "document"}, "document: "),
        ({"task": "query"}, {}, "query: "),
        ({}, {"prompt": "passage: "}, "passage: "),
    ],
)
def test_a_prepared_text_needs_no_word_of_what_stands_before_it(
    tiny_paths: dict[str, Path], spec: dict[str, Any], options: dict[str, Any], prompt: str
) -> None:
    with use_models({"m": {"path": str(tiny_paths["embed"]), **spec}}):
        prepared = tasks.prep_text("red apple", "m", **options)
        assert prepared["prompt"] == prompt
        assert tasks.embed_text(prepared, "m") == pytest.approx(tasks.embed_text("red apple", "m", **options), abs=1e-5)
        tasks.embed_text([prepared, prepared], "m", truncate=False)
        with pytest.raises(InvalidInputError, match="give prep_text and embed_text the same one"):
            tasks.embed_text(prepared, "m", prompt="other: ")


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize(("asked", "told"), [(12, 12), (16, 16), (32, 32), (1000, 32), (None, 32)])
def test_packed_bits_are_no_more_dimensions_than_the_vectors_have(
    tiny_paths: dict[str, Path], precision: str, asked: int | None, told: int
) -> None:
    with use_models({"m": {"path": str(tiny_paths["embed"]), "precision": precision}}):
        legit_worker.model("m").encode(["red", "cat"], truncate_dim=asked)
    assert (last_computed.get() or {})["dimensions"] == told


@pytest.mark.parametrize("kind", ["embed", "image"])
def test_a_model_does_not_load_with_more_dimensions_than_its_vectors_have(
    tiny_paths: dict[str, Path], kind: str
) -> None:
    has = tiny_models.IMAGE_DIMENSION if kind == "image" else 32
    spec: dict[str, Any] = {"kind": kind, "path": str(tiny_paths[kind])}
    told = rf"could not be loaded: LimitError: DIMENSIONS={has + 1}: its vectors have {has} numbers"
    with use_models({"m": spec | {"dimensions": has + 1}}), pytest.raises(ModelLoadError, match=told):
        legit_worker.model("m").encode("red")
    with use_models({"m": spec | {"dimensions": has}}):
        assert len(legit_worker.model("m").encode("red")) == has


@pytest.mark.parametrize("kind", ["embed", "rerank"])
def test_a_model_does_not_load_with_the_name_of_a_prompt_that_it_lacks(tiny_paths: dict[str, Path], kind: str) -> None:
    spec: dict[str, Any] = {"kind": kind, "path": str(tiny_paths[kind]), "prompt_name": "querry"}
    told = r"could not be loaded: LimitError: PROMPT_NAME=querry: its prompts are \["
    with use_models({"m": spec}), pytest.raises(ModelLoadError, match=told):
        legit_worker.model("m").prompts  # noqa: B018


def test_an_alias_that_shares_its_weights_fails_alone_if_it_names_a_prompt_that_there_is_not(
    tiny_paths: dict[str, Path],
) -> None:
    path = str(tiny_paths["embed"])
    with use_models({"m": {"path": path}, "other": {"path": path, "prompt_name": "querry"}}):
        with pytest.raises(ModelLoadError, match="'other' can't have PROMPT_NAME=querry: its prompts are"):
            legit_worker.model("other").encode("red")
        assert len(legit_worker.model("other").encode("red", prompt_name="query")) == 32
        with pytest.raises(InvalidInputError, match="prompt_name='querry' is not among"):
            legit_worker.model("m").encode("red", prompt_name="querry")


@pytest.mark.parametrize("precision", [None, "binary"])
def test_an_alias_that_shares_its_weights_fails_alone_if_it_asks_for_too_many_dimensions(
    tiny_paths: dict[str, Path], precision: str | None
) -> None:
    path = str(tiny_paths["embed"])
    wide = {"path": path, "dimensions": 33, "precision": precision}
    with use_models({"m": {"path": path}, "wide": wide}):
        with pytest.raises(ModelLoadError, match="'wide' can't have DIMENSIONS=33: its vectors have 32 numbers"):
            legit_worker.model("wide").encode("red")
        assert len(legit_worker.model("wide").encode("red", truncate_dim=8, precision="float32")) == 8
        assert len(legit_worker.model("m").encode("red")) == 32
        assert legit_worker.model("wide").encode([]).size == 0


@pytest.mark.parametrize("precision", [None, "binary"])
def test_a_task_that_asks_for_more_dimensions_than_there_are_is_refused(
    tiny_paths: dict[str, Path], precision: str | None
) -> None:
    path = str(tiny_paths["embed"])
    with use_models({"m": {"path": path}, "short": {"path": path, "dimensions": 8}}):
        for alias in ("m", "short"):
            with pytest.raises(InvalidInputError, match="dimensions=33: this model's vectors have 32 numbers"):
                tasks.embed_text("red", alias, dimensions=33, precision=precision)
        assert len(tasks.embed_text("red", "short", dimensions=32)) == 32
        # A handle does as the library.
        assert len(legit_worker.model("m").encode("red", truncate_dim=33)) == 32


def test_a_model_that_cuts_its_vectors_itself_can_give_them_whole(tiny_paths: dict[str, Path], tmp_path: Path) -> None:
    library = sentence_transformers.SentenceTransformer(str(tiny_paths["embed"]), device="cpu", truncate_dim=8)
    library.save_pretrained(str(tmp_path))
    with use_models({"m": {"path": str(tmp_path)}, "whole": {"path": str(tmp_path), "dimensions": 32}}):
        assert len(tasks.embed_text("red", "m")) == 8
        assert len(tasks.embed_text("red", "whole")) == 32
        assert len(tasks.embed_text(["red", "cat"], "whole", precision="binary")[0]) == 4
        with pytest.raises(InvalidInputError, match="have 32 numbers"):
            tasks.embed_text("red", "m", dimensions=33)


def test_what_computed_a_result_is_of_the_alias_that_was_called_last(tiny_paths: dict[str, Path]) -> None:
    path = str(tiny_paths["embed"])
    forget_calls()
    with use_models({"a": {"path": path}, "b": {"path": path, "dimensions": 4}}):
        a, b = legit_worker.model("a"), legit_worker.model("b")
        vectors = a.encode(["red", "cat"])
        a.similarity(vectors, vectors)
        assert (last_computed.get() or {})["dimensions"] == 32
        with pytest.raises(InvalidInputError):
            b.encode([5])
        assert (last_called.get(), last_computed.get()) == ("b", None)
        a.encode("red")
        b.similarity(vectors, vectors)
        assert (last_called.get(), last_computed.get()) == ("b", None)


def test_tasks_that_park_while_a_model_is_read_do_not_change_its_type(
    tiny_paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers sets the default type of the whole process meanwhile, and a task that parks sets its own one."""
    reading, parked = threading.Event(), threading.Event()
    read = sentence_transformers.SentenceTransformer.__init__

    def slowly(self: Any, *args: Any, **options: Any) -> None:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        reading.set()
        assert parked.wait(10)
        seen.append(torch.get_default_dtype())
        torch.set_default_dtype(before)
        read(self, *args, **options)

    def call(alias: str) -> Any:
        if alias == "fast":
            assert reading.wait(30)
            legit_worker.model("fast").map(["red"])
            parked.set()
            return None
        return legit_worker.model(alias).encode("red")

    seen: list[Any] = []
    monkeypatch.setattr(sentence_transformers.SentenceTransformer, "__init__", slowly)
    specs: dict[str, Any] = {
        "half": {"path": str(tiny_paths["embed"]), "dtype": "bfloat16"},
        "fast": {"kind": "simulated"},
    }
    with use_models(specs) as registry:
        legit_worker.model("fast").map(["red"])
        run_together(call, ["half", "fast"])
        assert [str(dtype) for dtype in seen] == ["torch.bfloat16"]
        with use(registry.get("half"), registry.residency) as model:
            assert {one.dtype for one in model.model.library.parameters()} == {torch.bfloat16}
