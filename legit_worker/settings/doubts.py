"""Settings that are fine one by one, and together do nothing, or something else than their author thinks.

In: settings. Out: sentences. `misnamed` stops a worker, since no task could ever run by such a name; the others warn.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator

from legit_worker.settings.model import ModelSettings
from legit_worker.settings.schema import Settings
from legit_worker.settings.values import BUILT_IN_TASKS, KINDS_WITH_PATH, spelled

#: Settings of an app that only say how its results are routed.
OF_ROUTING = ("queue", "format", "job", "url", "prefix", "encoding")


def misnamed(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each name by which no built-in task could ever run."""
    for task, aliases in settings.tasks.items():
        variable, known = spelled(("tasks", task)), BUILT_IN_TASKS[task]
        for alias, renames in aliases.items():
            owner = alias.removeprefix("legit_worker.")
            if owner != alias and owner in BUILT_IN_TASKS and (renames or owner != task):
                yield f"{variable}: {alias!r} is the name of a built-in task: choose another"
            for caller, own in renames.items():
                if own is not None and own not in known:
                    near = difflib.get_close_matches(own, known, n=1)
                    yield (
                        f"{variable}: {alias!r} makes {caller!r} the argument {own!r}, which {task} does not have: "
                        f"{f'did you mean {near[0]}? ' if near else ''}it has {', '.join(known)}"
                    )


def unused_prefixes(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each app whose prefix is for a `reply_to` that nobody reads."""
    if any(source.kind == "reply_to" for source in settings.app_from):
        return
    for app, own in settings.apps.items():
        if own.reply_to_prefix:
            yield (
                f"{spelled(('apps', app, 'reply_to_prefix'))} has no effect, since {spelled(('app_from',))} has no "
                f"reply_to: add it, as in {spelled(('app_from',))}={','.join(map(str, settings.app_from))},reply_to"
            )


def unused_revisions(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each model whose revision is of a folder, which has no others."""
    for alias, model in settings.models.items():
        if model.revision is not None and _has_one_revision(model):
            yield (
                f"{spelled(('models', alias, 'revision'))}={model.revision} has no effect, since {model.path} is a "
                "folder: give a name on the Hub as PATH, or leave REVISION out"
            )


def _has_one_revision(model: ModelSettings) -> bool:
    """Tell whether all files of a model are in its folder: an adapter and the model's code may be on the Hub."""
    folder = model.path or ""
    is_whole = not model.trust_remote_code and not os.path.exists(os.path.join(folder, "adapter_config.json"))
    return model.kind in KINDS_WITH_PATH and os.path.isdir(folder) and is_whole


def unused_times(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each model that is pinned, and would otherwise leave when it is idle."""
    for alias, model in settings.models.items():
        if model.pin and model.keep_alive is not None:
            yield (
                f"{spelled(('models', alias, 'keep_alive'))}={model.keep_alive:g} has no effect while "
                f"{spelled(('models', alias, 'pin'))} is on, since a pinned model stays: leave one of them out, unless "
                "an operator is to unpin the model"
            )


def unnamed_apps(settings: Settings) -> Iterator[str]:
    """Yield a sentence if there are settings of apps, and no task can name one."""
    if settings.apps and not settings.app_from:
        yield (
            f"{spelled(('app_from',))} is empty, so no task names an app, and what is set for "
            f"{', '.join(settings.apps)} has no effect: leave it out, or say where a task names its app"
        )


def unused_routes(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each app that says how its results are routed, and not that they are."""
    for app, own in settings.apps.items():
        given = [name for name in OF_ROUTING if name in own.model_fields_set]
        if given and "result_routing" not in own.model_fields_set:
            yield (
                f"{', '.join(spelled(('apps', app, name)) for name in given)}: no effect, since no result of this app "
                f"is routed: set {spelled(('apps', app, 'result_routing'))} to on, or to off if that is meant"
            )
        elif own.prefix and own.url and own.url.startswith(("amqp", "pyamqp")):
            yield (
                f"{spelled(('apps', app, 'prefix'))} has no effect, since it stands before names in Redis, and the "
                f"app's URL is of RabbitMQ: write the whole name in {spelled(('apps', app, 'queue'))}"
            )


def kindless_urls(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each app whose URL does not say what kind of server is there."""
    for app, own in settings.apps.items():
        if own.url and "://" not in own.url:
            yield (
                f"{spelled(('apps', app, 'url'))} names no kind of server, so it counts as a host of RabbitMQ: write "
                "it as amqp://user:password@host//, or redis://host:6379/0"
            )


def late_delays(settings: Settings) -> Iterator[str]:
    """Yield a sentence if a task that waits for company would be late for that alone."""
    delay = settings.max_queue_delay
    for name in ("max_wait_seconds", "target_latency"):
        bound = getattr(settings, name)
        if delay is not None and bound is not None and delay >= bound:
            yield (
                f"{spelled(('max_queue_delay',))}={delay:g} lets a task wait for company for {delay:g} s, and "
                f"{spelled((name,))} is {bound:g} s: lower the first one (both are in seconds), or set it to auto"
            )


def taken_for_tasks(settings: Settings, queues: Collection[str]) -> Iterator[str]:
    """Yield one sentence for each app whose results would come to a queue that this worker takes tasks from."""
    for app, own in settings.apps.items():
        is_plain = own.format == "json" and not own.url and not own.prefix
        if own.result_routing and is_plain and own.queue in queues:
            yield (
                f"{spelled(('apps', app, 'queue'))}={own.queue} is a queue of tasks that this worker reads: it would "
                f"take the app's results for tasks. Give the app a queue of its own, such as {app}.results"
            )


#: What a worker warns of at its start, and the doctor, too.
OF_SETTINGS = (unused_prefixes, unused_revisions, unused_times, unnamed_apps, unused_routes, kindless_urls, late_delays)


def doubtful(settings: Settings) -> Iterator[str]:
    """Yield one sentence for each setting that is surely not as its author thinks."""
    for found in OF_SETTINGS:
        yield from found(settings)
