"""A state that a server stores only if it still has what this worker found there.

A server may run a command long after it was sent: it was frozen or paused, or another worker's command came in
between. A state that is no SUCCESS must not replace a SUCCESS then. So the server compares what it has with what the
worker found, and not what these bytes mean: projects have their own serializers and compress results.

In: a key, what was found there, a state. Out: one command in place of `SETEX` and `PUBLISH`, and what its answer means.
"""

from __future__ import annotations

import hashlib

#: Stores and tells one state. KEYS: the task's key. ARGV: the SHA1 of the key's former value, empty if it had none;
#: seconds until the server forgets the key, empty if it keeps it; the state. Returns 0 if the key has another value by
#: now. An error of a command is the answer, as if the client had sent that command.
STORE = """
local stored = redis.pcall('GET', KEYS[1])
if type(stored) == 'string' and stored ~= '' then stored = redis.sha1hex(stored) else stored = '' end
if stored ~= ARGV[1] then return 0 end
local answer
if ARGV[2] == '' then
    answer = redis.pcall('SET', KEYS[1], ARGV[3])
else
    answer = redis.pcall('SETEX', KEYS[1], ARGV[2], ARGV[3])
end
if answer.err then return answer end
answer = redis.pcall('PUBLISH', KEYS[1], ARGV[3])
return type(answer) == 'table' and answer or 1
"""

#: The name by which the server knows the script.
SHA1 = hashlib.sha1(STORE.encode(), usedforsecurity=False).hexdigest()

#: How often a write looks again if the key has another value each time. A client that reads from a replica may never
#: see what the server has.
MOST_LOOKS = 5


def digest(value: bytes | str | None) -> str:
    """Return what the script compares a stored value by."""
    if not value:
        return ""
    raw = value.encode() if isinstance(value, str) else value
    return hashlib.sha1(raw, usedforsecurity=False).hexdigest()
