"""What the dead letters say: messages, and results, that did not reach their end. Pure.

In: the bytes of a list or queue of dead letters. Out: letters. And the other way: an app's envelope as a dead letter.

There are three kinds. A *result* is an app's envelope that did not reach its queue, with one more field, `dead`, last.
A *poisoned* message was delivered too often: the broker's part of this package keeps a record of it. An *unreadable*
one is no message that a worker can read; its bytes are kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

#: The list or queue of messages that were delivered too often, and the list of those that no worker can read.
POISONED, UNREADABLE = "legit.dead", "legit.unreadable"

#: What the names of the apps' dead letters begin with.
OF_APP = f"{POISONED}."

#: The most characters of a reason in an app's dead letter.
MAX_REASON = 500

#: Begins the field that makes an envelope a dead letter. It comes last, and its own texts have their quotes escaped.
_DEAD = b',"dead":{'

Kind = Literal["poisoned", "unreadable", "result"]


@dataclass(frozen=True, kw_only=True)
class Letter:
    """One dead letter."""

    kind: Kind
    #: The task's id; if there is none, the first digits of the bytes' SHA-256.
    id: str
    #: As the broker keeps it.
    raw: bytes = field(repr=False)
    task: str | None = None
    app: str | None = None
    #: Where it came from, or should go. None: to where the app's settings say.
    queue: str | None = None
    #: How the task ended; of results only.
    status: str | None = None
    #: Why it is here.
    reason: str | None = None
    #: How often it was delivered; of poisoned messages only.
    deliveries: int | None = None
    #: When it came here, or else when its task ended, as ISO 8601.
    at: str | None = None
    #: The envelope of a result, the kept message of a poisoned one; None if it is neither.
    content: dict[str, Any] | None = field(default=None, repr=False)

    def summary(self) -> dict[str, Any]:
        """Return all but the content."""
        return {name: value for name, value in asdict(self).items() if name not in ("raw", "content")}

    def details(self) -> dict[str, Any]:
        """Return all, with the raw bytes as text if they are no JSON object."""
        shown = {"raw": self.raw.decode(errors="backslashreplace")} if self.content is None else {}
        return self.summary() | {"content": self.content} | shown


def dead_queue(app: str) -> str:
    """Return the queue of an app's dead letters."""
    return OF_APP + app


def sealed(envelope: bytes, *, queue: str | None, reason: str) -> bytes:
    """Return an envelope as a dead letter. `queue` is the one that the message asked for, if it did."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    note = {"queue": queue, "reason": reason[:MAX_REASON], "at": now}
    return envelope[:-1] + _DEAD[:-1] + json.dumps(note).encode() + b"}"


def envelope_of(letter: Letter) -> bytes:
    """Return the envelope of a result's letter, as it was. Letters of older releases are bare envelopes."""
    return letter.raw if letter.reason is None else letter.raw.rpartition(_DEAD)[0] + b"}"


def read(raw: bytes, kind: Kind) -> Letter:
    """Read a dead letter. What can't be read has an id and its bytes."""
    if kind != "unreadable":
        try:
            found = json.loads(raw)
            return (_poisoned if kind == "poisoned" else _result)(raw, found)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            return Letter(kind=kind, id=_digest(raw), raw=raw, reason="its own record can't be read")
    return Letter(kind=kind, id=_digest(raw), raw=raw, reason="no worker can read it")


def _result(raw: bytes, found: dict[str, Any]) -> Letter:
    note = found.pop("dead", None) or {}
    return Letter(
        kind="result",
        id=str(found["id"]),
        raw=raw,
        task=found.get("task"),
        app=found.get("app"),
        queue=note.get("queue"),
        status=found.get("status"),
        reason=str(note.get("reason")) if note else None,
        at=note.get("at") or found.get("finished_at"),
        content=found,
    )


def _poisoned(raw: bytes, found: dict[str, Any]) -> Letter:
    return Letter(
        kind="poisoned",
        id=str(found.get("id") or _digest(raw)),
        raw=raw,
        task=found.get("task"),
        queue=found.get("queue"),
        reason=found.get("reason"),
        deliveries=found.get("deliveries"),
        at=found.get("at"),
        content=found,
    )


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:12]
