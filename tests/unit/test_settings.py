"""Settings: the table in the documentation, row by row, and what a wrong one says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from legit_worker.errors import SettingsError
from legit_worker.settings import (
    PREFIX,
    UNITS,
    Amount,
    AppSettings,
    AppSource,
    ModelSettings,
    Settings,
    changed,
    doubtful,
    fold,
    is_enabled,
    is_prep,
    load,
    path_variable,
    taken_for_tasks,
    unknown,
    unknown_models,
    with_bounds,
)
from legit_worker.settings.values import BUILT_IN_TASKS

#: What a switch may be.
SWITCH = "should be 1, on, yes or true, or 0, off, no or false"

PASSWORD = "hunter2"
URL = f"redis://:{PASSWORD}@results:6379/3"


def environ(variables: Mapping[str, Any]) -> dict[str, str]:
    return {PREFIX + name: str(value) for name, value in variables.items()}


def loaded(**variables: Any) -> Settings:
    return load(environ(variables))


def complaint(**variables: Any) -> str:
    """What `load` says of these, which must be wrong."""
    with pytest.raises(SettingsError) as caught:
        load(environ(variables))
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return str(caught.value)


def set_only(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Has the process's environment hold these of ours, and no others."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, text in environ(variables).items():
        monkeypatch.setenv(name, text)


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    """Writes a TOML file and gives its path."""

    def write(text: str) -> str:
        path = tmp_path / "legit.toml"
        path.write_text(text)
        return str(path)

    return write


# The table


def test_nothing_set_is_the_documented_defaults() -> None:
    assert load({}) == Settings(
        enabled=False,
        role="device",
        models={},
        device="auto",
        vram_headroom=Amount(10, "%"),
        vram_limit=None,
        lock_dir=None,
        cache_dir=None,
        window=None,
        max_queue_delay=None,
        max_wait_seconds=None,
        max_batch_seconds=0.5,
        prep_processes=0,
        tasks={},
        apps={},
        app_from=(AppSource("header", "app"), AppSource("kwarg", "app")),
        metrics_port=None,
    )


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("ENABLED", "1", "enabled", True),
        ("ENABLED", "on", "enabled", True),
        ("ENABLED", "0", "enabled", False),
        ("ENABLED", "off", "enabled", False),
        ("ROLE", "device", "role", "device"),
        ("ROLE", "prep", "role", "prep"),
        ("DEVICE", "auto", "device", "auto"),
        ("DEVICE", "cpu", "device", "cpu"),
        ("DEVICE", "cuda", "device", "cuda"),
        ("DEVICE", "cuda:12", "device", "cuda:12"),
        ("DEVICE", "simulated", "device", "simulated"),
        ("VRAM_HEADROOM", "25%", "vram_headroom", Amount(25, "%")),
        ("VRAM_HEADROOM", "0", "vram_headroom", Amount(0, "B")),
        ("VRAM_LIMIT", "4GiB", "vram_limit", Amount(4, "GiB")),
        ("VRAM_LIMIT", "512MiB", "vram_limit", Amount(512, "MiB")),
        ("VRAM_LIMIT", "1000000", "vram_limit", Amount(1_000_000, "B")),
        ("HOST_CACHE", "8GiB", "host_cache", Amount(8, "GiB")),
        ("LOCK_DIR", "/var/lock/gpus", "lock_dir", Path("/var/lock/gpus")),
        ("CACHE_DIR", "/var/cache/models", "cache_dir", Path("/var/cache/models")),
        ("WINDOW", "1", "window", 1),
        ("WINDOW", "100000", "window", 100_000),
        ("MAX_QUEUE_DELAY", "auto", "max_queue_delay", None),
        ("MAX_QUEUE_DELAY", "0", "max_queue_delay", 0.0),
        ("MAX_QUEUE_DELAY", "0.02", "max_queue_delay", 0.02),
        ("MAX_WAIT_SECONDS", "off", "max_wait_seconds", None),
        ("MAX_WAIT_SECONDS", "60", "max_wait_seconds", 60.0),
        ("MAX_BATCH_SECONDS", "2", "max_batch_seconds", 2.0),
        ("TARGET_LATENCY", "0.2", "target_latency", 0.2),
        ("TARGET_LATENCY", "off", "target_latency", None),
        ("MAX_HELD_SECONDS", "2.5", "max_held_seconds", 2.5),
        ("MAX_DELIVERIES", "0", "max_deliveries", 0),
        ("LEASE_SECONDS", "6", "lease_seconds", 6.0),
        ("PREP_PROCESSES", "4", "prep_processes", 4),
        ("APP_FROM", "reply_to", "app_from", (AppSource("reply_to"),)),
        ("METRICS_PORT", "9100", "metrics_port", 9100),
        ("METRICS_PORT", "off", "metrics_port", None),
        ("METRICS_PORT", "0", "metrics_port", 0),
        ("LOG", "json", "log", "json"),
    ],
)
def test_a_variable_sets_its_field(variable: str, text: str, field: str, value: Any) -> None:
    assert getattr(loaded(**{variable: text}), field) == value


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("PATH", "sentence-transformers/all-MiniLM-L6-v2", "path", "sentence-transformers/all-MiniLM-L6-v2"),
        ("KIND", "embed", "kind", "embed"),
        ("KIND", "rerank", "kind", "rerank"),
        ("KIND", "sparse", "kind", "sparse"),
        ("KIND", "image", "kind", "image"),
        ("KIND", "simulated", "kind", "simulated"),
        ("KIND", "my_project.models:Detector", "kind", "my_project.models:Detector"),
        ("PIN", "1", "pin", True),
        ("PIN", "off", "pin", False),
        ("KEEP_ALIVE", "300", "keep_alive", 300.0),
        ("KEEP_ALIVE", "0.5", "keep_alive", 0.5),
        ("BACKEND", "openvino", "backend", "openvino"),
        ("BACKEND", "onnx", "backend", "onnx"),
        ("BACKEND", "auto", "backend", "auto"),
        ("DTYPE", "auto", "dtype", "auto"),
        ("DTYPE", "float32", "dtype", "float32"),
        ("DTYPE", "float16", "dtype", "float16"),
        ("DTYPE", "bfloat16", "dtype", "bfloat16"),
        ("REVISION", "main", "revision", "main"),
    ],
)
def test_a_models_variable_sets_its_field(variable: str, text: str, field: str, value: Any) -> None:
    model = loaded(**{"MODELS__MINILM__PATH": "somewhere", f"MODELS__MINILM__{variable}": text}).models["minilm"]
    assert getattr(model, field) == value


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("RESULT_ROUTING", "on", "result_routing", True),
        ("RESULT_ROUTING", "1", "result_routing", True),
        ("RESULT_ROUTING", "TRUE", "result_routing", True),
        ("RESULT_ROUTING", "off", "result_routing", False),
        ("RESULT_ROUTING", "0", "result_routing", False),
        ("RESULT_ROUTING", "false", "result_routing", False),
        ("QUEUE", "Vod.results:1", "queue", "Vod.results:1"),
        ("FORMAT", "json", "format", "json"),
        ("FORMAT", "celery", "format", "celery"),
        ("FORMAT", "laravel", "format", "laravel"),
        ("JOB", r"App\Jobs\EmbeddingReady@handle", "job", r"App\Jobs\EmbeddingReady@handle"),
        ("URL", URL, "url", URL),
        ("PREFIX", "laravel-database-", "prefix", "laravel-database-"),
        ("REPLY_TO_PREFIX", "vod.answers.", "reply_to_prefix", "vod.answers."),
        ("ENCODING", "json", "encoding", "json"),
        ("ENCODING", "base64", "encoding", "base64"),
        ("BATCHING", "off", "batching", False),
        ("BATCHING", "on", "batching", True),
        ("WEIGHT", "0.25", "weight", 0.25),
        ("MODELS", "minilm", "models", ("minilm",)),
        ("MODELS", "MiniLM, clip", "models", ("minilm", "clip")),
        ("MODELS", '["MiniLM", "clip"]', "models", ("minilm", "clip")),
    ],
)
def test_an_apps_variable_sets_its_field(variable: str, text: str, field: str, value: Any) -> None:
    assert getattr(loaded(**{f"APPS__VODMANAGER__{variable}": text}).apps["vodmanager"], field) == value


@pytest.mark.parametrize(
    ("text", "aliases"),
    [
        ('{"conductor.embed": {"content": "text"}}', {"conductor.embed": {"content": "text"}}),
        ('{"conductor.embed": {"trace": null}}', {"conductor.embed": {"trace": None}}),
        ('{"conductor.embed": null, "b": {}}', {"conductor.embed": {}, "b": {}}),
        ('["conductor.embed", "b"]', {"conductor.embed": {}, "b": {}}),
        ("conductor.embed", {"conductor.embed": {}}),
        ("App.Embed", {"App.Embed": {}}),
    ],
)
@pytest.mark.parametrize("task", BUILT_IN_TASKS)
def test_a_built_in_task_takes_aliases(task: str, text: str, aliases: dict[str, Any]) -> None:
    assert loaded(**{f"TASKS__{task.upper()}": text}).tasks == {task: aliases}


def test_an_apps_defaults_are_those_documented() -> None:
    assert loaded(APPS__VOD__RESULT_ROUTING="off").apps["vod"] == AppSettings(
        result_routing=False,
        queue=None,
        format="json",
        job=None,
        url=None,
        prefix="",
        encoding="json",
        batching=True,
        weight=1,
        models=None,
    )


def test_a_models_defaults_are_those_documented() -> None:
    assert loaded(MODELS__M__PATH="x").models["m"] == ModelSettings(
        path="x", kind="embed", pin=False, keep_alive=None, backend="torch", dtype=None, revision=None
    )


@pytest.mark.parametrize("kind", ["simulated", "my.models:Detector"])
def test_only_the_built_in_kinds_need_a_path(kind: str) -> None:
    assert loaded(MODELS__M__KIND=kind).models["m"].path is None


def test_settings_are_frozen() -> None:
    settings = loaded(MODELS__M__PATH="x", APPS__A__WEIGHT="1")
    for group, field in [(settings, "window"), (settings.models["m"], "path"), (settings.apps["a"], "weight")]:
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(group, field, None)


def test_settings_made_directly_read_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGIT_WORKER_WINDOW", "7")
    assert Settings().window is None


def test_the_process_environment_is_read_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    set_only(monkeypatch, WINDOW="7")
    assert load().window == 7


def test_a_given_environment_is_read_instead_of_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGIT_WORKER_WINDOW", "7")
    assert load({}).window is None


@pytest.mark.parametrize("default", [False, True])
def test_enabled_has_the_callers_default(default: bool) -> None:
    assert load({}, enabled_by_default=default).enabled is default
    assert load(environ({"ENABLED": "0"}), enabled_by_default=default).enabled is False


# Names


@pytest.mark.parametrize("spelling", ["MAX_BATCH_SECONDS", "max_batch_seconds", "Max_Batch_Seconds"])
def test_case_does_not_count_after_the_prefix(spelling: str) -> None:
    assert loaded(**{spelling: "3"}).max_batch_seconds == 3


def test_another_programs_variable_is_none_of_ours() -> None:
    assert load({"LEGIT_WORKERS": "1", "legit_worker_window": "2", "XLEGIT_WORKER_WINDOW": "3"}) == load({})


@pytest.mark.parametrize("alias", ["all-MiniLM-L6-v2", "bge.small", "MY_MODEL", "_x"])
def test_an_alias_may_hold_what_containers_allow_and_is_lower_case(alias: str) -> None:
    assert list(loaded(**{f"MODELS__{alias}__PATH": "x"}).models) == [alias.lower()]


def test_an_apps_name_is_lower_case() -> None:
    assert list(loaded(**{"APPS__Vod-Manager.v2:eu__WEIGHT": "2"}).apps) == ["vod-manager.v2:eu"]
    assert list(Settings(apps={"VOD": AppSettings()}, models={"M": ModelSettings(path="x")}).apps) == ["vod"]


def test_an_empty_variable_counts_as_not_set() -> None:
    assert loaded(WINDOW="", CONFIG="", NO_SUCH_THING="") == load({})


@pytest.mark.parametrize("spelling", ["MODELS__MINILM__PATH", "Models__MiniLM__path"])
def test_a_model_that_only_an_empty_path_speaks_of_is_refused(spelling: str) -> None:
    assert complaint(**{spelling: ""}).startswith(f"LEGIT_WORKER_{spelling} is empty: give model 'minilm' a folder,")


def test_an_empty_path_of_a_model_that_has_more_counts_as_not_set(toml: Any) -> None:
    assert loaded(MODELS__SIM__KIND="simulated", MODELS__SIM__PATH="").models == {
        "sim": ModelSettings(kind="simulated")
    }
    path = toml("[models.text-3]\npath = 'x'")
    assert loaded(CONFIG=path, MODELS__TEXT_3__PATH="").models == {"text-3": ModelSettings(path="x")}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SERVICE_HOST", "10.0.0.7"),
        ("SERVICE_PORT", "6379"),
        ("SERVICE_PORT_REDIS", "6379"),
        ("PORT", "tcp://10.0.0.7:6379"),
        ("PORT_6379_TCP", "tcp://10.0.0.7:6379"),
        ("PORT_6379_TCP_ADDR", "10.0.0.7"),
        ("PORT_6379_TCP_PORT", "6379"),
        ("PORT_6379_TCP_PROTO", "tcp"),
        ("METRICS_SERVICE_HOST", "10.0.0.8"),
        ("METRICS_PORT", "tcp://10.0.0.8:9100"),
        ("METRICS_PORT_9100_TCP_ADDR", "10.0.0.8"),
    ],
)
def test_what_kubernetes_sets_for_a_service_is_no_setting(name: str, text: str) -> None:
    assert loaded(**{name: text}) == load({})
    assert unknown(environ({name: text})) == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("PREP_PRIVATE", "10.0.0.0/33", "10.0.0.0/33.*10.0.0.0/8"),
        ("PREP_PRIVATE", "10.0.0.0/8,internal", "internal"),
        ("PREP_HOSTS", "https://", "'https://' should be a host"),
        ("PREP_HOSTS", "a.example,*", "should be a host"),
        ("PREP_HOSTS", "a.example/pictures", "should be a host"),
        ("PREP_HOSTS", "ftp://a.example", "should be a host"),
        ("PREP_HOSTS", "a.example:http", "should be a host"),
        ("PREP_HOSTS", "me@a.example", "should be a host"),
        ("PREP_ROOTS", "/images,~no-such-user/images", "no user"),
        ("LOCK_DIR", "~no-such-user", "no user"),
        ("APPS__VOD__URL", "reds://host/0", "reds:// is no server.*redis"),
        ("IMAGE_FORMATS", "JPG", "'JPG' should be one of JPEG"),
        ("IMAGE_FORMATS", "EPS", "'EPS' should be one of"),
        ("IMAGE_FORMATS", "[]", "at least 1"),
        ("MAX_PIXELS", "1000000000", "178956970"),
        ("MAX_ITEMS", "0", "greater than or equal to 1"),
        ("APPS__VOD__MODELS", "minlm", "APPS__VOD__MODELS names 'minlm', which is no model; did you mean minilm?"),
        ("NO_APP_MODELS", "clip,minilmm_l6", "NO_APP_MODELS names 'minilmm_l6'.*did you mean minilm-l6?"),
    ],
)
def test_what_would_fail_later_is_refused_at_the_start_by_its_name(name: str, text: str, said: str) -> None:
    models = {f"MODELS__{alias}__PATH": "x" for alias in ("minilm", "minilm-l6", "clip")}
    message = complaint(**models, **{name: text})
    assert f"LEGIT_WORKER_{name}" in message
    assert re.search(said, message)


def test_a_format_that_is_refused_is_told_once() -> None:
    assert complaint(IMAGE_FORMATS="EPS").count("LEGIT_WORKER_IMAGE_FORMATS") == 1


@pytest.mark.parametrize("host", ["a.example", "*.a.example:8443", "http://images:8080", "https://[::1]", "10.0.0.7"])
def test_hosts_of_every_form_are_taken(host: str) -> None:
    assert loaded(PREP_HOSTS=host).prep_hosts == (host,)


@pytest.mark.parametrize("url", ["redis://h/0", "rediss://h", "sentinel://a;sentinel://b:2", "sqla+sqlite:///x", "h:1"])
def test_urls_of_servers_that_celery_knows_are_taken(url: str) -> None:
    assert loaded(APPS__VOD__URL=url).apps["vod"].url == url


@pytest.mark.parametrize("other", ["bge-m3", "minilm-l12", "minilm-l6-int8"])
def test_a_model_that_only_another_worker_has_is_told_and_not_refused(other: str) -> None:
    chosen = loaded(**{"MODELS__minilm-l6__PATH": "x", "APPS__VOD__MODELS": f"minilm_l6,{other}"})
    (sentence,) = unknown_models(chosen)
    assert sentence == (
        f"LEGIT_WORKER_APPS__VOD__MODELS names {other!r}, and this worker has no such model: it has minilm-l6."
    )


def test_home_folders_are_written_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    models = {"MODELS__M__PATH": "~/m", "MODELS__S__KIND": "x:Y", "MODELS__S__PATH": "~"}
    chosen = loaded(PREP_ROOTS="~/a,/b", LOCK_DIR="~", **models)
    assert chosen.prep_roots == (Path("/home/me/a"), Path("/b"))
    assert chosen.lock_dir == Path("/home/me")
    assert (chosen.models["m"].path, chosen.models["s"].path) == ("/home/me/m", "~")


def test_no_models_for_tasks_without_an_app_is_not_all_of_them() -> None:
    assert loaded().no_app_models is None
    assert loaded(NO_APP_MODELS="none").no_app_models == ()
    assert loaded(NO_APP_MODELS="a, B").no_app_models == ("a", "b")


def test_unknown_variables_are_told_without_loading_any() -> None:
    assert unknown(environ({"ENABLE": "1", "WINDOW": "lots", "XYZZY": ""})) == [
        "LEGIT_WORKER_ENABLE is not a setting; did you mean LEGIT_WORKER_ENABLED?"
    ]


@pytest.mark.parametrize("name", ["text-embedding-3", "Text_Embedding.3", "TEXT/embedding_3"])
def test_names_of_models_differ_neither_by_case_nor_by_what_a_variable_can_not_spell(name: str) -> None:
    assert fold(name) == "text_embedding_3"
    assert path_variable(name) == "LEGIT_WORKER_MODELS__TEXT_EMBEDDING_3__PATH"


def test_two_aliases_that_no_task_could_tell_apart_are_refused(toml: Any) -> None:
    said = "'a-b' and 'a_b' are one name, since - . / count as _ there: rename one"
    assert complaint(**{"MODELS__a-b__KIND": "simulated", "MODELS__A_B__KIND": "simulated"}).endswith(said)
    path = toml("[models.a-b]\nkind = 'simulated'\n[models.a_b]\nkind = 'simulated'")
    assert complaint(CONFIG=path) == f"models in {path}: {said}"


@pytest.mark.parametrize("name", ["MODELS__M__PATH", "WINDOW"])
def test_a_variable_that_is_there_in_two_spellings_is_refused(name: str) -> None:
    said = f"LEGIT_WORKER_{name} and LEGIT_WORKER_{name.lower()} are one setting"
    assert complaint(**{name: "1", name.lower(): "2"}).startswith(said)
    load({f"LEGIT_WORKER_{name}": "1", f"LEGIT_WORKER_{name.lower()}": ""})


def test_a_variable_beats_the_file_for_an_alias_that_it_can_not_spell(toml: Any) -> None:
    path = toml("[models.'text-embedding-3']\npath = 'x'\npin = true")
    assert loaded(CONFIG=path, MODELS__TEXT_EMBEDDING_3__PATH="y").models == {
        "text-embedding-3": ModelSettings(path="y", pin=True)
    }
    assert complaint(CONFIG=path, MODELS__TEXT_EMBEDDING_3__PIN="tight").startswith(
        "LEGIT_WORKER_MODELS__TEXT_EMBEDDING_3__PIN='tight': "
    )


def test_each_model_and_app_is_its_own() -> None:
    settings = loaded(
        MODELS__A__PATH="a", MODELS__A__PIN="1", MODELS__B__KIND="simulated", APPS__A__WEIGHT="2", APPS__B__QUEUE="q"
    )
    assert settings.models == {"a": ModelSettings(path="a", pin=True), "b": ModelSettings(kind="simulated")}
    assert settings.apps == {"a": AppSettings(weight=2), "b": AppSettings(queue="q")}


# What is wrong


@pytest.mark.parametrize(
    ("variable", "suggestion"),
    [
        ("WINDW", "WINDOW"),
        ("ENABLE", "ENABLED"),
        ("VRAM_LIMITS", "VRAM_LIMIT"),
        ("CONFG", "CONFIG"),
        ("MODELS__MINILM__PATHH", "MODELS__MINILM__PATH"),
        ("MODEL__MINILM__PATH", "MODELS__MINILM__PATH"),
        ("MODELS_MINILM_PATH", "MODELS__<NAME>__PATH"),
        ("MODELS____PATH", "MODELS__<NAME>__PATH"),
        ("MODELS__A__B__PATH", "MODELS__A__PATH"),
        ("TASKS__EMBED_TXT", "TASKS__EMBED_TEXT"),
        ("APPS__VOD__ROUTING", "APPS__VOD__RESULT_ROUTING"),
        ("APPS__VOD__WEIGTH", "APPS__VOD__WEIGHT"),
    ],
)
def test_an_unknown_variable_is_named_with_a_suggestion(variable: str, suggestion: str) -> None:
    assert complaint(**{variable: "1"}) == (
        f"LEGIT_WORKER_{variable} is not a setting; did you mean LEGIT_WORKER_{suggestion}?"
    )


@pytest.mark.parametrize("variable", ["XYZZY", "MODELS__M", "MODELS", "APPS", "TASKS", "WINDOW__MAX", ""])
def test_a_variable_that_is_no_setting_is_refused(variable: str) -> None:
    assert complaint(**{variable: "{}"}).startswith(f"LEGIT_WORKER_{variable} is not a setting")


def test_an_unknown_variable_is_named_as_it_was_spelt() -> None:
    assert complaint(**{"Models__MiniLM__Pathh": "x"}).startswith("LEGIT_WORKER_Models__MiniLM__Pathh is not")


@pytest.mark.parametrize(
    ("variable", "text", "reason"),
    [
        ("ENABLED", "perhaps", SWITCH),
        ("ROLE", "cook", "'device' or 'prep'"),
        ("DEVICE", "gpu", "auto, cpu, cuda, cuda:N, simulated, or a GPU"),
        ("DEVICE", "cuda:", "auto, cpu, cuda, cuda:N, simulated, or a GPU"),
        ("DEVICE", "cuda:0\n", "auto, cpu, cuda, cuda:N, simulated, or a GPU"),
        ("VRAM_HEADROOM", "110%", "110% is more than all there is"),
        ("VRAM_HEADROOM", "100%", "100% leaves no memory for models"),
        ("VRAM_HEADROOM", "lots", "10%"),
        *((name, "0", "should be above 0") for name in ("VRAM_LIMIT", "RESULT_MAX_BYTES", "MAX_IMAGE_BYTES")),
        ("VRAM_LIMIT", "0%", "should be above 0"),
        ("APPS__SHOP__MAX_IMAGE_BYTES", "0MiB", "should be above 0"),
        ("VRAM_LIMIT", "-1", "GiB"),
        ("VRAM_LIMIT", "4GB", "GiB"),
        ("VRAM_LIMIT", "4.GiB", "GiB"),
        ("HOST_CACHE", "10%", "should be bytes"),
        ("WINDOW", "lots", "Input should be a valid integer"),
        ("WINDOW", "0", "greater than or equal to 1"),
        ("WINDOW", "100001", "less than or equal to 100000"),
        ("WINDOW", "1.5", "valid integer"),
        ("MAX_QUEUE_DELAY", "-1", "greater than or equal to 0"),
        ("MAX_QUEUE_DELAY", "soon", "valid number"),
        ("MAX_QUEUE_DELAY", "inf", "finite"),
        ("MAX_WAIT_SECONDS", "0", "greater than 0"),
        ("MAX_BATCH_SECONDS", "0", "greater than 0"),
        ("TARGET_LATENCY", "0", "greater than 0"),
        ("MAX_HELD_SECONDS", "0", "greater than 0"),
        ("MAX_DELIVERIES", "-1", "greater than or equal to 0"),
        ("LEASE_SECONDS", "0.5", "greater than or equal to 1"),
        ("MAX_HELD_SECONDS", "x", "valid number"),
        ("MAX_BATCH_SECONDS", "nan", "finite"),
        ("PREP_PROCESSES", "-1", "greater than or equal to 0"),
        ("PREP_PROCESSES", "100000", "less than or equal to 1024"),
        ("METRICS_PORT", "-1", "greater than or equal to 0"),
        ("METRICS_PORT", "65536", "less than or equal to 65535"),
        ("APP_FROM", "header", "header:<name>"),
        ("APP_FROM", "cookie:app", "header:<name>"),
        ("APP_FROM", "reply_to:app", "header:<name>"),
        ("APP_FROM", "queue:embed", "no group (?P<app>…)"),
        ("APP_FROM", "queue:(?P<app>.", "not a regular expression"),
        ("TASKS__EMBED_TEXT", '{"a": ', "not valid JSON"),
        ("TASKS__EMBED_TEXT", '["a"', "not valid JSON"),
        ("TASKS__EMBED_TEXT", "[1]", "should be a task's name"),
        ("TASKS__EMBED_TEXT", '{"a": "text"}', "valid dictionary"),
        ("TASKS__EMBED_TEXT", '{"a": {"content": 1}}', "valid string"),
        ("TASKS__EMBED_TEXT", '{"": {}}', "at least 1 character"),
        ("MODELS__M__KIND", "embedding", "module:Class"),
        ("MODELS__M__KIND", "module:", "module:Class"),
        ("MODELS__M__KIND", "1module:Class", "module:Class"),
        ("MODELS__M__PIN", "tight", SWITCH),
        ("MODELS__M__KEEP_ALIVE", "5m", "valid number"),
        ("MODELS__M__KEEP_ALIVE", "-1", "greater than or equal to 0"),
        ("MODELS__M__DTYPE", "int9", "bfloat16"),
        ("MODELS__M__DTYPE", "int8", "backend 'torch' computes auto, float32"),
        ("MODELS__M__BACKEND", "tensorrt", "openvino"),
        ("APPS__A__RESULT_ROUTING", "maybe", SWITCH),
        ("APPS__A__QUEUE", "a b", "1 to 128 of the characters"),
        ("APPS__A__QUEUE", "q" * 129, "1 to 128 of the characters"),
        ("APPS__A__FORMAT", "pickle", "'json', 'celery' or 'laravel'"),
        ("APPS__A__ENCODING", "hex", "'json' or 'base64'"),
        ("APPS__A__BATCHING", "some", SWITCH),
        ("APPS__A__WEIGHT", "0", "greater than 0"),
        ("APPS__A__WEIGHT", "nan", "finite"),
        ("APPS__A__MODELS", "[1]", "valid string"),
        ("APPS__A__MODELS", "[", "not valid JSON"),
    ],
)
def test_a_bad_value_is_told_with_its_variable(variable: str, text: str, reason: str) -> None:
    rest = {"MODELS__M__PATH": "x"} if variable.startswith("MODELS") else {}
    message = complaint(**{variable: text, **rest})
    assert message.startswith(f"LEGIT_WORKER_{variable}={text!r}: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["embed", "rerank", "sparse", "image"])
def test_a_model_of_a_built_in_kind_needs_a_path(kind: str) -> None:
    message = complaint(MODELS__M__KIND=kind)
    assert message.startswith(f"LEGIT_WORKER_MODELS__M__PATH: a model of kind '{kind}' needs a path")


@pytest.mark.parametrize("app", ["a b", "a/b", "ü", "a" * 129])
def test_an_apps_name_is_checked(app: str) -> None:
    message = complaint(**{f"APPS__{app}__WEIGHT": "1"})
    assert message.startswith(f"LEGIT_WORKER_APPS__{app.upper()}: should be 1 to 128")


def test_one_alias_for_two_tasks_is_refused() -> None:
    message = complaint(TASKS__EMBED_TEXT="compute", TASKS__RERANK="compute")
    assert message.endswith("'compute' can't be in both LEGIT_WORKER_TASKS__EMBED_TEXT and LEGIT_WORKER_TASKS__RERANK")


def test_several_problems_are_all_told_one_per_line() -> None:
    lines = complaint(WINDOW="lots", DEVICE="gpu", WINDW="1", CONFIG="/no/such/file").splitlines()
    named = {re.split(r"[=: ]", line)[0].removeprefix(PREFIX) for line in lines}
    assert named == {"WINDOW", "DEVICE", "WINDW", "CONFIG"}
    assert len(lines) == 4


@pytest.mark.parametrize(
    "variables",
    [
        {"APPS__A__URL": URL, "APPS__A__WEIGHT": "0"},
        {"APPS__A__ULR": URL},
        {"APPS__A": f'{{"url": "{URL}"}}'},
        {"APPS__A B__URL": URL},
        {"URL": URL},
    ],
)
def test_a_url_is_in_no_message(variables: dict[str, str]) -> None:
    assert PASSWORD not in complaint(**variables)


def test_a_url_is_in_no_repr() -> None:
    assert PASSWORD not in repr(loaded(APPS__A__URL=URL))


# The file


FILE = """
enabled = true
window = 64
vram_limit = 1000000
app_from = ["queue:(?P<app>a,b)", "reply_to"]
metrics_port = "off"

[models.MiniLM]
path = "from-the-file"
pin = true

[models.clip]
kind = "image"
path = "clip"

[tasks]
embed_text = { "conductor.embed" = { content = "text" } }
rerank = ["a", "b"]
prep_text = "p"

[apps.Vod]
weight = 3
models = ["MiniLM"]
"""


def test_the_file_is_read(toml: Any) -> None:
    assert loaded(CONFIG=toml(FILE)) == Settings(
        enabled=True,
        window=64,
        vram_limit=Amount(1_000_000),
        app_from=(AppSource("queue", "(?P<app>a,b)"), AppSource("reply_to")),
        models={
            "minilm": ModelSettings(path="from-the-file", pin=True),
            "clip": ModelSettings(kind="image", path="clip"),
        },
        tasks={
            "embed_text": {"conductor.embed": {"content": "text"}},
            "rerank": {"a": {}, "b": {}},
            "prep_text": {"p": {}},
        },
        apps={"vod": AppSettings(weight=3, models=("minilm",))},
    )


def test_a_variable_beats_the_file_and_leaves_its_neighbours(toml: Any) -> None:
    settings = loaded(
        CONFIG=toml(FILE), WINDOW="8", ENABLED="0", MODELS__MINILM__PATH="from-the-environment", APPS__VOD__WEIGHT="5"
    )
    assert settings.window == 8
    assert settings.enabled is False
    assert settings.vram_limit == Amount(1_000_000)
    assert settings.models["minilm"] == ModelSettings(path="from-the-environment", pin=True)
    assert settings.models["clip"] == ModelSettings(kind="image", path="clip")
    assert settings.apps["vod"] == AppSettings(weight=5, models=("minilm",))


@pytest.mark.parametrize("text", ["only.this", '["only.this"]', '{"only.this": {}}'])
def test_a_variable_replaces_the_files_value_however_it_is_spelt(toml: Any, text: str) -> None:
    tasks = loaded(CONFIG=toml(FILE), TASKS__EMBED_TEXT=text).tasks
    assert tasks["embed_text"] == {"only.this": {}}
    assert tasks["rerank"] == {"a": {}, "b": {}}


def test_a_model_or_app_may_be_in_both_halves(toml: Any) -> None:
    path = toml('[models.rerank]\nkind = "rerank"')
    assert loaded(CONFIG=path, MODELS__RERANK__PATH="x").models == {"rerank": ModelSettings(kind="rerank", path="x")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("windoww = 1", "windoww in {path} is not a setting; did you mean window?"),
        ("xyzzy = 1", "xyzzy in {path} is not a setting"),
        (
            "[models.minilm]\npath = 'x'\npathh = 'x'",
            "models.minilm.pathh in {path} is not a setting; did you mean models.minilm.path?",
        ),
        ("[apps.a]\nulr = '{url}'", "apps.a.ulr in {path} is not a setting; did you mean apps.a.url?"),
        ("[tasks]\nembed = 'a'", "tasks.embed in {path}: should be one of embed_text, embed_image"),
        ("window = 'lots'", "window in {path}: Input should be a valid integer"),
        ("[apps.a]\nbatching = []", "apps.a.batching in {path}: " + SWITCH),
        ("models = 'minilm'", "models in {path}: Input should be a valid dictionary"),
        ("models = []", "models in {path}: Input should be a valid dictionary"),
        ("apps = []", "apps in {path}: Input should be a valid dictionary"),
        ("workers = []", "workers in {path}: Input should be a valid dictionary"),
        ("tasks = []", "tasks in {path}: Input should be a valid dictionary"),
        ("queues = []", "queues in {path} is not a setting"),
        ("image_formats = []", "image_formats in {path}: "),
        ("[apps.a]\nimage_formats = []", "apps.a.image_formats in {path}: "),
        ("[models]\nminilm = '{url}'", "models.minilm in {path}: Input should be"),
        ("[models.q]", "models.q.path in {path}: a model of kind 'embed' needs a path"),
        ("[apps.a]\nurl = ['{url}']", "apps.a.url in {path}: Input should be a valid string"),
        ("[apps.'a b']\nurl = '{url}'", "apps.a b in {path}: should be 1 to 128"),
        ("[apps.a]\nmodels = [1]", "apps.a.models.0 in {path}: Input should be a valid string"),
        ("window = ", "LEGIT_WORKER_CONFIG='{path}': "),
        ("window = 1\nwindow = 2", "LEGIT_WORKER_CONFIG='{path}': "),
        ("config = '/etc/w.toml'", "LEGIT_WORKER_CONFIG='{path}': the file can't name another one"),
        ("[models.A]\npath = 'x'\n[models.a]\npath = 'y'", "LEGIT_WORKER_CONFIG='{path}': 'a' is there twice"),
        ("[apps.Shop]\n[apps.shop]", "LEGIT_WORKER_CONFIG='{path}': 'shop' is there twice"),
        ("metrics_port = true", "metrics_port in {path}: true is no value of this setting, which is no switch"),
        ("window = true", "window in {path}: true is no value"),
        ("max_queue_delay = false", "max_queue_delay in {path}: false is no value"),
        ("[apps.a]\nweight = true", "apps.a.weight in {path}: true is no value"),
        ("[models.a]\npath = 'x'\nkeep_alive = true", "models.a.keep_alive in {path}: true is no value"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(toml: Any, text: str, message: str) -> None:
    path = toml(text.replace("{url}", URL))
    said = complaint(CONFIG=path)
    assert said.startswith(message.replace("{path}", path))
    assert "\n" not in said
    assert PASSWORD not in said


LISTS = """
app_from = []
no_app_models = []
prep_roots = []
prep_hosts = []
prep_private = []
tasks.embed_text = []
apps.vod.models = []
workers.small.models = []
models.m.path = "a"
"""


def test_an_empty_list_of_the_file_is_no_entry_and_never_all_of_them(toml: Any) -> None:
    chosen = loaded(CONFIG=toml(LISTS))
    assert (chosen.no_app_models, chosen.apps["vod"].models, chosen.workers["small"].models) == ((), (), ())
    assert (chosen.app_from, chosen.prep_roots, chosen.prep_hosts, chosen.prep_private) == ((), (), (), ())
    assert chosen.tasks == {"embed_text": {}}
    assert loaded(CONFIG=toml(LISTS), NODE="small").models == {}


def test_an_empty_list_is_written_as_a_variable_that_is_not_empty(toml: Any) -> None:
    chosen = loaded(CONFIG=toml(LISTS))
    written = dict(line.split("=", 1) for line in changed(chosen))
    assert written["LEGIT_WORKER_APPS__VOD__MODELS"] == "[]"
    assert written["LEGIT_WORKER_NO_APP_MODELS"] == "[]"
    assert load(written) == chosen


def test_options_are_written_as_they_are_read() -> None:
    chosen = loaded(MODELS__M__PATH="a", MODELS__M__MODEL_KWARGS='{"attn_implementation": "sdpa"}')
    assert load(dict(line.split("=", 1) for line in changed(chosen))) == chosen


def test_a_file_has_its_switches_as_true_and_false(toml: Any) -> None:
    model = "[models.a]\npath = 'x'\npin = true\nnormalize = false"
    app = "[apps.a]\nresult_routing = true\nbatching = false"
    chosen = loaded(CONFIG=toml(f"enabled = true\n{model}\n{app}"))
    assert (chosen.enabled, chosen.models["a"].pin, chosen.models["a"].normalize) == (True, True, False)
    assert (chosen.apps["a"].result_routing, chosen.apps["a"].batching) == (True, False)


def test_a_bad_variable_is_told_even_where_the_file_has_the_same_setting(toml: Any) -> None:
    assert complaint(CONFIG=toml("window = 3"), WINDOW="lots").startswith("LEGIT_WORKER_WINDOW='lots': ")


def test_a_file_that_can_not_be_read_is_told(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert complaint(CONFIG=missing) == f"LEGIT_WORKER_CONFIG={str(missing)!r}: No such file or directory"
    assert complaint(CONFIG=tmp_path) == f"LEGIT_WORKER_CONFIG={str(tmp_path)!r}: Is a directory"
    not_text = tmp_path / "not_text.toml"
    not_text.write_bytes(b"\xff\xfe")
    assert complaint(CONFIG=not_text).startswith(f"LEGIT_WORKER_CONFIG={str(not_text)!r}: ")


def test_a_file_is_found_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, toml: Any) -> None:
    monkeypatch.setenv("HOME", str(Path(toml("window = 3")).parent))
    assert loaded(CONFIG="~/legit.toml").window == 3


# Amounts and sources


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [
        ("10%", 1000, 100),
        ("0%", 1000, 0),
        ("100%", 1000, 1000),
        ("33.3%", 1000, 333),
        ("4GiB", 0, 4 * 2**30),
        ("1.5 KiB", 0, 1536),
        ("512mib", 0, 512 * 2**20),
        ("1TiB", 0, 2**40),
        ("1000000", 0, 1_000_000),
        ("7B", 0, 7),
    ],
)
def test_an_amount_is_so_many_bytes(text: str, total: int, expected: int) -> None:
    assert Amount.parse(text).of(total) == expected


@given(st.integers(0, 100), st.integers(0, 2**48))
def test_a_share_is_never_more_than_the_whole(percent: int, total: int) -> None:
    share = Amount.parse(f"{percent}%").of(total)
    assert 0 <= share <= total
    assert share == pytest.approx(total * percent / 100, abs=1)


@given(st.integers(0, 10**15 - 1), st.sampled_from(sorted(UNITS)), st.integers(0, 2**48))
def test_an_amount_in_a_unit_is_exact_whatever_the_device_has(number: int, unit: str, total: int) -> None:
    assert Amount.parse(f"{number}{unit}").of(total) == number * UNITS[unit]


@given(
    st.one_of(
        st.builds(Amount, st.integers(0, 10**12), st.sampled_from(sorted(UNITS))),
        st.builds(Amount, st.integers(0, 100), st.just("%")),
    )
)
def test_an_amount_is_shown_as_it_may_be_written(amount: Amount) -> None:
    assert Amount.parse(str(amount)) == amount


@given(st.text())
def test_any_text_is_an_amount_or_a_value_error(text: str) -> None:
    try:
        amount = Amount.parse(text)
    except ValueError:
        return
    assert amount.of(2**40) >= 0


names = st.from_regex(r"[a-z][a-z0-9_-]{0,10}", fullmatch=True)
sources = st.one_of(
    st.builds(AppSource, st.sampled_from(["header", "kwarg"]), names),
    st.just(AppSource("reply_to")),
    st.builds(
        AppSource,
        st.just("queue"),
        st.sampled_from([r"(?P<app>\w+)", r"(?P<app>a{1,3})\.embed", "x,y,(?P<app>[a,b:]+)", "(?:q:)?(?P<app>.*),"]),
    ),
)


@given(st.lists(sources, min_size=1), st.sampled_from([",", ", "]))
def test_app_sources_are_read_in_order_and_keep_the_commas_of_a_regex(chosen: list[AppSource], separator: str) -> None:
    text = separator.join(f"{source.kind}:{source.value}".rstrip(":") for source in chosen)
    assert loaded(APP_FROM=text).app_from == tuple(chosen)


def test_app_sources_may_be_a_json_list_for_the_regex_that_commas_alone_can_not_tell() -> None:
    assert loaded(APP_FROM='["queue:(?P<app>a,header:b)", "header:app"]').app_from == (
        AppSource("queue", "(?P<app>a,header:b)"),
        AppSource("header", "app"),
    )


# is_enabled


@pytest.mark.parametrize("default", [False, True])
def test_the_default_decides_where_nothing_else_does(default: bool) -> None:
    assert is_enabled({}, default=default) is default
    assert is_enabled(environ({"ENABLED": ""}), default=default) is default


@pytest.mark.parametrize("text", ["1", "0", "on", "off", "true", "FALSE", "yes", "no", "t", "f"])
@pytest.mark.parametrize("default", [False, True])
def test_is_enabled_agrees_with_load(text: str, default: bool) -> None:
    given_environ = environ({"ENABLED": text})
    assert is_enabled(given_environ, default=default) is load(given_environ, enabled_by_default=default).enabled


@pytest.mark.parametrize("text", ["perhaps", " 0", "2"])
def test_a_value_that_load_refuses_counts_as_enabled(text: str) -> None:
    assert is_enabled(environ({"ENABLED": text})) is True
    assert complaint(ENABLED=text)


def test_other_bad_settings_do_not_matter_to_is_enabled() -> None:
    assert is_enabled(environ({"ENABLED": "0", "WINDOW": "lots", "NO_SUCH_THING": "1"})) is False


def test_is_enabled_reads_the_file_and_the_variable_beats_it(toml: Any) -> None:
    path = toml("enabled = true")
    assert is_enabled(environ({"CONFIG": path})) is True
    assert is_enabled(environ({"CONFIG": path, "ENABLED": "off"})) is False


@pytest.mark.parametrize("text", ["enabled = 0", "enabled = 'off'", "enabled = false"])
def test_a_file_may_say_no_in_any_way(toml: Any, text: str) -> None:
    assert is_enabled(environ({"CONFIG": toml(text)}), default=True) is False


@pytest.mark.parametrize("text", ["enabled = 'perhaps'", "enabled = [1]"])
def test_a_files_value_that_load_refuses_counts_as_enabled(toml: Any, text: str) -> None:
    assert is_enabled(environ({"CONFIG": toml(text)})) is True


@pytest.mark.parametrize("path", ["/no/such/file", "~nobody-at-all/file", "/"])
def test_a_file_that_can_not_be_read_counts_as_enabled(path: str) -> None:
    assert is_enabled(environ({"CONFIG": path})) is True
    assert is_enabled(environ({"CONFIG": path, "ENABLED": "0"}), default=True) is False
    assert is_prep(environ({"CONFIG": path})) is False


def test_a_broken_file_counts_as_enabled(toml: Any) -> None:
    assert is_enabled(environ({"CONFIG": toml("enabled = ")})) is True


def test_is_enabled_reads_the_process_environment_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    set_only(monkeypatch, ENABLED="1")
    assert is_enabled() is True


# What it imports

IMPORT = """
import sys, types
# The package's own __init__ is the seam to Celery; what is looked at here is this module.
package = types.ModuleType("legit_worker")
package.__path__ = [sys.argv[1]]
sys.modules["legit_worker"] = package
import legit_worker.settings
legit_worker.settings.load({})
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "pynvml", "celery", "kombu", "numpy"}))
"""


def test_loading_settings_imports_neither_torch_nor_pynvml_nor_celery() -> None:
    folder = Path(sys.modules["legit_worker"].__path__[0])
    done = subprocess.run([sys.executable, "-c", IMPORT, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_whole_package_imports_neither_torch_nor_pynvml() -> None:
    code = "import sys, legit_worker.settings; print(*({'torch', 'pynvml'} & set(sys.modules)))"
    root = Path(sys.modules["legit_worker"].__path__[0]).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == ""


def test_what_differs_from_the_defaults_is_written_as_variables() -> None:
    chosen = loaded(
        ENABLED=1,
        ROLE="device",
        MODELS__MINILM__PATH="/models/minilm",
        MODELS__MINILM__PIN=1,
        VRAM_LIMIT="4GiB",
        VRAM_HEADROOM="10%",
        APP_FROM="header:team,reply_to",
        PREP_HOSTS="a.example,b.example",
        TASKS__EMBED_TEXT='{"conductor.embed": {"content": "text"}}',
        APPS__VOD__BATCHING="off",
        APPS__VOD__MODELS="minilm",
    )
    assert list(changed(chosen)) == [
        "LEGIT_WORKER_ENABLED=on",
        "LEGIT_WORKER_MODELS__MINILM__PATH=/models/minilm",
        "LEGIT_WORKER_MODELS__MINILM__PIN=on",
        "LEGIT_WORKER_VRAM_LIMIT=4GiB",
        "LEGIT_WORKER_PREP_HOSTS=a.example,b.example",
        'LEGIT_WORKER_TASKS__EMBED_TEXT={"conductor.embed": {"content": "text"}}',
        "LEGIT_WORKER_APPS__VOD__BATCHING=off",
        "LEGIT_WORKER_APPS__VOD__MODELS=minilm",
        "LEGIT_WORKER_APP_FROM=header:team,reply_to",
    ]
    assert list(changed(Settings())) == []


@pytest.mark.parametrize(
    "url", ["redis://me:{}@host:6379/3?password={}", "redis://host/0?password={}", "me:{}@host", "amqp://{}@host//"]
)
@pytest.mark.parametrize("password", ["hunter2", "hun/ter2", "hun@ter2", "hun?ter2", "hun#ter2", "hun://ter2"])
def test_no_url_among_them_shows_a_password(url: str, password: str) -> None:
    try:
        (line,) = changed(loaded(APPS__VOD__URL=url.replace("{}", password)))
    except SettingsError as error:  # kombu can't read the URL
        line = str(error)
    assert line.startswith("LEGIT_WORKER_APPS__VOD__URL")
    assert "hun" not in line
    assert "ter2" not in line


@pytest.mark.parametrize(
    "url",
    ["redis://h:99999/0", "redis://h:x/0", "redis://[::1/0", "redis://h/zero", "redis://h/0?password=a&transport=b",
     "rediss://h?ssl_cert_reqs=odd", "sentinel://a/0;sentinel://b/x", "amqp://h:port//"],
)  # fmt: skip
def test_a_url_that_could_not_be_read_later_is_refused_now(url: str) -> None:
    assert "LEGIT_WORKER_APPS__VOD__URL: the URL" in complaint(APPS__VOD__URL=url)


def test_a_url_among_them_shows_its_server() -> None:
    (line,) = changed(loaded(APPS__VOD__URL=URL))
    assert line == "LEGIT_WORKER_APPS__VOD__URL=redis://results:6379/3"


def test_an_apps_own_bound_beats_the_one_of_all_apps() -> None:
    bounded = with_bounds(loaded(QUEUE_MAX_LENGTH="10", APPS__VOD__QUEUE_MAX_LENGTH="0", APPS__OTHER__WEIGHT="2"))
    lengths = {name: app.queue_max_length for name, app in bounded.apps.items()}
    assert lengths == {"vod": 0, "other": 10}
    assert bounded.apps["vod"].dead_max_seconds == 0


# Those that do nothing together


def routed(**more: str) -> dict[str, str]:
    return {"APPS__SHOP__RESULT_ROUTING": "on"} | {f"APPS__SHOP__{name}": value for name, value in more.items()}


@pytest.mark.parametrize("url", ["localhost:6379", f"me:{PASSWORD}@redis.internal"])
def test_a_url_that_names_no_kind_of_server_is_told(url: str) -> None:
    (said,) = doubtful(loaded(**routed(URL=url)))
    assert said.startswith("LEGIT_WORKER_APPS__SHOP__URL names no kind of server")
    assert PASSWORD not in said
    assert not list(doubtful(loaded(**routed(URL="redis://h"))))


def test_a_prefix_that_no_message_is_compared_with_is_told() -> None:
    (said,) = doubtful(loaded(APPS__VOD__REPLY_TO_PREFIX="v", APPS__OTHER__WEIGHT="2", APP_FROM="header:app"))
    assert said.startswith("LEGIT_WORKER_APPS__VOD__REPLY_TO_PREFIX has no effect")
    assert said.endswith("LEGIT_WORKER_APP_FROM=header:app,reply_to")
    assert not list(doubtful(loaded(APPS__VOD__REPLY_TO_PREFIX="v", APP_FROM="header:app,reply_to")))


def test_an_apps_queue_that_the_worker_takes_tasks_from_is_told() -> None:
    (said,) = taken_for_tasks(loaded(**routed(QUEUE="celery")), ["celery"])
    assert said.startswith("LEGIT_WORKER_APPS__SHOP__QUEUE=celery is a queue of tasks")
    assert said.endswith("such as shop.results")
    others = {"FORMAT": "celery", "JOB": "done"}, {"URL": "redis://h"}, {"PREFIX": "shop-"}, {"RESULT_ROUTING": "off"}
    for other in others:
        assert not list(taken_for_tasks(loaded(**routed(QUEUE="celery", **other)), ["celery"]))
    assert not list(taken_for_tasks(loaded(**routed()), ["celery"]))


def test_a_delay_by_which_each_task_is_late_is_told() -> None:
    (said,) = doubtful(loaded(MAX_QUEUE_DELAY="5", MAX_WAIT_SECONDS="1"))
    assert said.startswith("LEGIT_WORKER_MAX_QUEUE_DELAY=5 lets a task wait for company for 5 s")
    assert "LEGIT_WORKER_MAX_WAIT_SECONDS is 1 s" in said
    assert len(list(doubtful(loaded(MAX_QUEUE_DELAY="5", MAX_WAIT_SECONDS="1", TARGET_LATENCY="2")))) == 2
    assert not list(doubtful(loaded(MAX_QUEUE_DELAY="0.5", MAX_WAIT_SECONDS="1")))
    assert not list(doubtful(loaded(MAX_WAIT_SECONDS="1")))


def test_a_revision_of_a_folder_is_told(tmp_path: Path) -> None:
    model = {"MODELS__M__PATH": str(tmp_path), "MODELS__M__REVISION": "v1"}
    (said,) = doubtful(loaded(**model))
    assert said == (
        f"LEGIT_WORKER_MODELS__M__REVISION=v1 has no effect, since {tmp_path} is a folder: give a name on the Hub as "
        "PATH, or leave REVISION out"
    )
    for other in ({"MODELS__M__PATH": "org/name"}, {"MODELS__M__KIND": "own:Class"}, {"MODELS__M__REVISION": ""}):
        assert not list(doubtful(loaded(**model | other)))
    (tmp_path / "adapter_config.json").touch()  # the model below it may be on the Hub
    assert not list(doubtful(loaded(**model)))


def test_a_time_after_which_a_pinned_model_does_not_leave_is_told() -> None:
    pinned = {"MODELS__M__PATH": "a", "MODELS__M__PIN": "1", "MODELS__M__KEEP_ALIVE": "600"}
    (said,) = doubtful(loaded(**pinned))
    assert said.startswith(
        "LEGIT_WORKER_MODELS__M__KEEP_ALIVE=600 has no effect while LEGIT_WORKER_MODELS__M__PIN is on, since a pinned "
        "model stays"
    )
    for name in ("PIN", "KEEP_ALIVE"):
        assert not list(doubtful(loaded(**pinned | {f"MODELS__M__{name}": ""})))


def test_apps_that_no_task_can_name_are_told() -> None:
    (said,) = doubtful(loaded(APPS__SHOP__WEIGHT="2", APPS__VOD__WEIGHT="2", APP_FROM="[]"))
    assert said.startswith("LEGIT_WORKER_APP_FROM is empty, so no task names an app")
    assert "shop, vod" in said
    assert not list(doubtful(loaded(APP_FROM="[]")))


def test_a_route_of_an_app_without_routing_is_told() -> None:
    (said,) = doubtful(loaded(APPS__SHOP__QUEUE="a", APPS__SHOP__FORMAT="celery", APPS__SHOP__WEIGHT="2"))
    assert said == (
        "LEGIT_WORKER_APPS__SHOP__QUEUE, LEGIT_WORKER_APPS__SHOP__FORMAT: no effect, since no result of this app is "
        "routed: set LEGIT_WORKER_APPS__SHOP__RESULT_ROUTING to on, or to off if that is meant"
    )
    assert not list(doubtful(loaded(APPS__SHOP__WEIGHT="2", APPS__SHOP__QUEUE_MAX_LENGTH="5")))
    assert not list(doubtful(loaded(APPS__SHOP__QUEUE="a", APPS__SHOP__RESULT_ROUTING="off")))
    assert not list(doubtful(loaded(APPS__SHOP__QUEUE="a", APPS__SHOP__RESULT_ROUTING="on")))


def test_a_prefix_for_rabbitmq_is_told() -> None:
    (said,) = doubtful(loaded(**routed(URL=f"amqps://me:{PASSWORD}@h//", PREFIX="a-")))
    assert said.startswith("LEGIT_WORKER_APPS__SHOP__PREFIX has no effect")
    assert PASSWORD not in said
    for other in ({"URL": "redis://h", "PREFIX": "a-"}, {"URL": "amqp://h"}, {"PREFIX": "a-"}):
        assert not list(doubtful(loaded(**routed(**other))))
