"""What the built-in tasks refuse, and what an alias makes of a message; without a worker or a real model."""

from __future__ import annotations

import base64
import io
import logging
import re
from inspect import signature
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import build_tracer
from PIL import Image

from legit_worker import settings, tasks
from legit_worker.errors import InvalidInputError
from legit_worker.inputs.limits import limits_of
from legit_worker.inputs.options import form_of
from legit_worker.inputs.reading import images_or_both_of
from legit_worker.models.options import refuse
from legit_worker.models.prompts import chosen_prompt, filled
from legit_worker.settings.values import BUILT_IN_TASKS
from legit_worker.testing import use_models, vector

DEFAULTS = limits_of(settings.Settings(), "")


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    return file.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_an_image_that_would_fill_memory_is_refused_by_its_head_alone() -> None:
    bomb = png((9000, 9000))
    assert len(bomb) < 100_000
    with pytest.raises(InvalidInputError, match=r"9000 x 9000 pixels and one may have 64000000"):
        images_or_both_of(encoded(bomb), "image", DEFAULTS)


def test_an_image_is_decoded_only_when_its_turn_comes() -> None:
    (file,) = images_or_both_of(encoded(png((8, 4))), "image", DEFAULTS)
    assert file.decode().size == (8, 4)
    assert file.decode().mode == "RGB"


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("https://example.org/a.png", "this is not base64: it has the character ':'"),
        ("/var/www/photo.jpg", "this is not base64: it has the character '.'"),
        ("iVBOR%2Bw", "this is not base64: it has the character '%'"),
        ("abc", "this is not base64 with padding: its 3 characters are no multiple of 4"),
        ("", "the image is empty: send a file as base64"),
        (None, "expected an image as base64, got NoneType"),
    ],
)
def test_what_is_no_base64_is_named(image: Any, said: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{re.escape(said)}$"):
        images_or_both_of(image, "image", DEFAULTS)


def test_an_image_file_that_ends_early_is_invalid_input() -> None:
    noise = Image.effect_noise((64, 64), 100)
    whole = io.BytesIO()
    noise.save(whole, "PNG")
    with pytest.raises(InvalidInputError, match="can't be read"):
        images_or_both_of(encoded(whole.getvalue()[:-500]), "image", DEFAULTS)[0].decode()


@pytest.mark.parametrize("text", ["", " \n", None, 3, float("nan"), b"bytes", {}], ids=repr)
def test_what_is_not_a_text_is_invalid_input(text: object) -> None:
    with pytest.raises(InvalidInputError):
        tasks.embed_text(text if not isinstance(text, list) else [text])


def test_a_bad_item_of_a_list_is_named() -> None:
    with pytest.raises(InvalidInputError, match="item 2: the text is empty"):
        tasks.embed_text(["fine", "fine", ""])


def test_more_items_than_one_task_takes_are_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidInputError, match=f"{tasks.MAX_ITEMS + 1} items and one task takes {tasks.MAX_ITEMS}"):
        tasks.embed_text(["text"] * (tasks.MAX_ITEMS + 1))


ALIASES = '{"conductor.embed": {"content": "text", "model_name": "model", "job_id": null}}'


def app_with_aliases() -> Celery:
    app = Celery("aliases", set_as_current=False)
    tasks.register(app, settings.load({"LEGIT_WORKER_TASKS__EMBED_TEXT": ALIASES}))
    return app


def test_an_alias_renames_arguments_drops_those_that_map_to_nothing_and_the_apps_name() -> None:
    task = app_with_aliases().tasks["conductor.embed"]
    with use_models({"sim": {"kind": "simulated"}}):
        assert task(content="a text", model_name="sim", job_id=7, app="vodmanager") == [
            float(v) for v in vector("a text")
        ]


@pytest.mark.parametrize("args", [{"text": "a river"}, {"t": "a river"}, "a"], ids=repr)
def test_arguments_that_are_no_list_are_refused(args: Any) -> None:
    """A PHP array with names is an object in JSON. Python would embed the name of its first argument."""
    app = app_with_aliases()
    task = app.tasks["legit_worker.embed_text"]
    traced = build_tracer(task.name, task, eager=True, propagate=True, app=app)
    with (
        use_models({"sim": {"kind": "simulated"}}),
        pytest.raises(InvalidInputError, match=r"args must be a list, got (dict|str): send arguments that have names"),
    ):
        traced("an-id", args, {}, {})


@pytest.mark.parametrize("name", ["task", "self"])
def test_an_argument_of_any_name_is_the_callers(name: str) -> None:
    task = app_with_aliases().tasks["legit_worker.embed_text"]
    with pytest.raises((InvalidInputError, TypeError), match=r"task must be query or document|argument 'self'"):
        task("a text", **{name: "passage"})


def test_registering_twice_is_as_good_as_once_and_a_projects_own_task_keeps_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app = Celery("own", set_as_current=False)

    @app.task(name="conductor.embed", shared=False)
    def own() -> str:
        return "the project's own"

    chosen = settings.load({"LEGIT_WORKER_TASKS__EMBED_TEXT": ALIASES})
    with caplog.at_level(logging.WARNING):
        tasks.register(app, chosen)
        tasks.register(app, chosen)
    assert app.tasks["conductor.embed"]() == own() == "the project's own"
    assert {record.message for record in caplog.records} == {
        "the project has a task conductor.embed: it keeps the name, and there is no alias of this name"
    }


def test_other_apps_of_the_process_get_no_task() -> None:
    app_with_aliases()
    assert "conductor.embed" not in Celery("other", set_as_current=False).tasks


@pytest.mark.parametrize("value", ["false", "true", "", 2, 0.5, [], {}])
def test_a_word_is_no_switch(value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^normalize must be true or false, got {re.escape(repr(value))}$"):
        form_of(None, None, value)
    with pytest.raises(InvalidInputError, match=r"^truncate must be true or false, got "):
        tasks.embed_text("a text", truncate=value)


@pytest.mark.parametrize(("value", "is_on"), [(True, True), (1, True), (False, False), (0, False)])
def test_what_json_has_for_on_and_off_is_a_switch(value: Any, is_on: bool) -> None:
    assert form_of(None, None, value) == {"normalize_embeddings": is_on}
    assert form_of(None, None, None) == {}


@pytest.mark.parametrize(
    ("variable", "aliases", "said"),
    [
        (
            "EMBED_TEXT",
            '{"old": {"content": "texxt"}}',
            "the argument 'texxt', which embed_text does not have: did you",
        ),
        ("RERANK", '{"old": {"content": "text"}}', "which rerank does not have: it has query, documents, model, top_k"),
        ("EMBED_TEXT", "legit_worker.rerank", "'legit_worker.rerank' is the name of a built-in task"),
        (
            "RERANK",
            '{"legit_worker.rerank": {"passages": "documents"}}',
            "'legit_worker.rerank' is the name of a built",
        ),
    ],
)
def test_a_name_by_which_no_task_could_run_stops_the_worker(variable: str, aliases: str, said: str) -> None:
    chosen = settings.load({f"LEGIT_WORKER_TASKS__{variable}": aliases})
    with pytest.raises(SystemExit) as stopped:
        tasks.check_or_exit(chosen)
    assert str(stopped.value).startswith(f"legit_worker: LEGIT_WORKER_TASKS__{variable}: ")
    assert said in str(stopped.value)


def test_the_settings_know_each_tasks_arguments() -> None:
    assert {name: tuple(signature(task).parameters) for name, task in tasks.BUILT_IN.items()} == BUILT_IN_TASKS


@pytest.mark.parametrize("aliases", [ALIASES, "legit_worker.embed_text", "embed_text", "legit_worker.mine"])
def test_a_name_by_which_a_task_can_run_stops_nothing(aliases: str) -> None:
    tasks.check_or_exit(settings.load({"LEGIT_WORKER_TASKS__EMBED_TEXT": aliases}))


def test_two_arguments_that_stand_for_one_are_refused_unless_they_are_equal_or_one_is_null() -> None:
    task = app_with_aliases().tasks["conductor.embed"]
    with use_models({"sim": {"kind": "simulated"}}):
        expected = [float(value) for value in vector("a text")]
        assert task(text=None, content="a text", model_name="sim") == expected
        assert task(content="a text", text=None, model_name="sim") == expected
        assert task(content="a text", text="a text", model_name="sim") == expected
        with pytest.raises(InvalidInputError, match="'text' and another argument of this task both stand for text"):
            task(content="a text", text="another")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_seq_length": 0}, "max_seq_length=0 would leave no tokens: give at least 1"),
        ({"max_seq_length": -1}, "max_seq_length=-1 would leave no tokens"),
        ({"max_seq_length": "8"}, "max_seq_length='8' should be a whole number"),
        ({"truncate_dim": 8.5}, r"truncate_dim=8\.5 should be a whole number"),
        ({"truncate_dim": 0}, "truncate_dim=0 would leave no numbers"),
    ],
)
def test_a_handles_count_is_a_whole_number_of_at_least_one(options: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        refuse({}, "encode", **options)
    refuse({}, "encode", max_seq_length=None, truncate_dim=8)


def test_an_empty_name_of_a_prompt_is_no_name() -> None:
    with pytest.raises(InvalidInputError, match="prompt_name='' is not among this model's prompts"):
        chosen_prompt({"query": "q: "}, "query", None, "", None)
    assert chosen_prompt({"query": "q: "}, "query", None, None, None) == "q: "


def test_more_options_by_their_places_than_a_call_knows_are_refused() -> None:
    spec = settings.ModelSettings(kind="embed", path="/m")
    with pytest.raises(TypeError, match=r"encode\(\) takes prompt_name and prompt by their places: give other options"):
        filled(spec, "encode", ["a text", None, None, 32], {})
    assert filled(spec, "encode", ["a text", "query"], {})[1:] == (
        ["a text"],
        {"prompt_name": "query", "is_told": True},
    )
