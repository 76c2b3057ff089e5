"""The script that reserves messages on a Redis server, and the messages that it reserved.

In: the script's answer. Out: messages that kombu can deliver.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from kombu.utils.encoding import bytes_to_str

from legit_worker.quickjson import loads

#: The most messages, and bytes, of one reservation. The first reservation after a wait asks for one message, and each
#: full one doubles the next. So if there are few messages, an idle worker beside this one gets its share.
MOST_MESSAGES = 64
MOST_BYTES = 1 << 20

#: The same while an app sends little beside others: its next message waits until these have become tasks, 0.5 ms each.
SHARED_MESSAGES = 16

#: Messages that a worker holds at most while it holds a suspect: a message that other workers held as they died. The
#: fewer deliveries the suspect has left, the fewer others it takes with it; the last one it spends alone. So no good
#: message dies for another's crashes, and yet good ones don't wait for each other.
COMPANY = 32
LITTLE_COMPANY = 4

#: The script's first number. More messages may be waiting; a suspect is next, for which the worker holds too many
#: others; bytes are next of which the server can't say whether they are a message; there were as many as were asked
#: for, and the lists are empty. It is 0 if there were fewer.
MORE, NO_ROOM, UNSURE, LAST = 1, 2, 3, 4

#: Acks, and then reserves. It notes each message among the unacked ones, as kombu's `QoS.append` does
#: (kombu.transport.redis, 5.7), and with its owner, and only then takes it off its list. If a queue's consumer doesn't
#: ack, the script takes its messages and notes nothing, as kombu does.
#:
#: Python decides what is a message, since it reads the notes later. So the script stops at bytes of which it is not
#: sure, and the next call brings the verdict: `+` or `-`, and the SHA1 of the bytes.
#:
#: KEYS: the unacked messages, their index, the list of unreadable bytes, what the owner holds, then lists: most urgent
#: priority first, the queues of one priority in a row.
#: ARGV: most messages, most bytes, now (seconds), the start of a new tag, 1 if queues take turns, a verdict, 1 if there
#: is an owner, most deliveries, messages that the worker holds, their bound (0: none), the number of acks; then the
#: acked tags; then for each queue its name, and 1 if its messages are acked.
#: Returns a number (see above), and the bound that a suspect brings; then, for each message, its list's number, its
#: tag, and its bytes. The tag is empty if the script is not sure about the bytes.
RESERVE = """
local messages, bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local now, new_tag, turns, verdict, owned = ARGV[3], ARGV[4], ARGV[5] == '1', ARGV[6], ARGV[7] == '1'
local most, held, bound, acks = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local names = 11 + acks
local queues = (#ARGV - names) / 2
local reply, times, owner = {0, 0}, {}, {}

local function table_or_empty(value)
    return type(value) == 'table' and value or {}
end

-- How many messages a worker may hold together with one that was held by this many workers as they died.
local function company(deliveries)
    if deliveries < 1 then return 0 end
    if most == 0 or most - deliveries > 2 then return COMPANY end
    return most - deliveries == 2 and LITTLE_COMPANY or 1
end

local function stop(reason)
    reply[1] = reason
    return nil
end

local function read(raw, list)
    local ok, message = pcall(cjson.decode, raw)
    if ok and string.find(raw, '^{') and not string.find(raw, '%c') then
        return message
    end
    local sha = redis.sha1hex(raw)
    if verdict == '+' .. sha then
        return table_or_empty(ok and message)
    end
    if verdict == '-' .. sha then
        redis.call('RPUSH', KEYS[3], raw)
        redis.call('RPOP', KEYS[list])
        return false
    end
    reply[#reply + 1] = list - 4
    reply[#reply + 1] = ''
    reply[#reply + 1] = raw
    return stop(3)
end

local function note(raw, message, list, queue)
    local properties = table_or_empty(message.properties)
    local to = table_or_empty(properties.delivery_info)
    local tag, exchange, routing_key = properties.delivery_tag, to.exchange, to.routing_key
    if type(exchange) ~= 'string' or type(routing_key) ~= 'string' then
        exchange, routing_key = '', ARGV[names + 2 * queue - 1]
    end
    if ARGV[names + 2 * queue] ~= '1' then
        return type(tag) == 'string' and tag or new_tag .. #reply
    end
    local noted = '[' .. raw .. ', ' .. cjson.encode(exchange) .. ', ' .. cjson.encode(routing_key) .. ']'
    if type(tag) ~= 'string' or tag == '' or redis.call('HSETNX', KEYS[1], tag, noted) == 0 then
        tag = new_tag .. #reply
        redis.call('HSET', KEYS[1], tag, noted)
    end
    times[#times + 1] = now
    times[#times + 1] = tag
    owner[#owner + 1] = tag
    owner[#owner + 1] = now .. ' ' .. KEYS[list]
    return tag
end

-- Returns true if a message was taken off its list, false if there was none, nil if the script must stop.
local function reserve(list, queue)
    local raw = redis.call('LINDEX', KEYS[list], -1)
    if not raw then return false end
    local message = read(raw, list)
    if not message then return message == false or nil end
    local beside = company(tonumber(table_or_empty(message.headers).legit_deliveries) or 0)
    local room = beside > 0 and (bound == 0 or beside < bound) and beside or bound
    if room > 0 and held >= room then
        reply[2] = beside
        return stop(2)
    end
    local tag = note(raw, message, list, queue)
    redis.call('RPOP', KEYS[list])
    messages, bytes, held, bound = messages - 1, bytes - #raw, held + 1, room
    reply[#reply + 1] = list - 4
    reply[#reply + 1] = tag
    reply[#reply + 1] = raw
    return true
end

local function reserve_all()
    for first = 5, #KEYS, queues do
        local again = true
        while again do
            again = false
            for queue = 1, queues do
                repeat
                    if messages <= 0 or bytes <= 0 then
                        return stop(redis.call('EXISTS', unpack(KEYS, 5)) > 0 and 1 or 4)
                    end
                    local found = reserve(first + queue - 1, queue)
                    if found == nil then return end
                    again = again or found
                until turns or not found
            end
        end
    end
end

if acks > 0 then
    redis.call('ZREM', KEYS[2], unpack(ARGV, 12, names))
    redis.call('HDEL', KEYS[1], unpack(ARGV, 12, names))
    if owned then redis.call('HDEL', KEYS[4], unpack(ARGV, 12, names)) end
else
    -- A full server lets a script go on that has begun to write. This write takes no memory, and changes nothing.
    redis.call('ZREM', KEYS[2], '')
end
local ok, failure = pcall(reserve_all)
if #times > 0 then
    redis.call('ZADD', KEYS[2], unpack(times))
    if owned then redis.call('HSET', KEYS[4], unpack(owner)) end
end
if not ok and #reply == 2 then
    return type(failure) == 'table' and failure or redis.error_reply(failure)
end
if not ok then reply[1] = 1 end
return reply
""".replace("LITTLE_COMPANY", str(LITTLE_COMPANY)).replace("COMPANY", str(COMPANY))
SHA1 = hashlib.sha1(RESERVE.encode(), usedforsecurity=False).hexdigest()


def company(deliveries: int, most: int) -> int:
    """Return how many messages a worker may hold together with one that this many workers held as they died."""
    if most == 0 or most - deliveries > 2:
        return COMPANY
    return LITTLE_COMPANY if most - deliveries == 2 else 1


def _loads(raw: bytes) -> Any:
    """Read JSON, in which bytes that are no UTF-8 become U+FFFD, as kombu reads a message."""
    try:
        return loads(raw)
    except UnicodeDecodeError:
        return loads(bytes_to_str(raw))


@dataclass(frozen=True)
class Source:
    """One list of messages."""

    queue: str
    key: str
    #: Whether its consumer acks; otherwise the script notes nothing.
    acks: bool


@dataclass(frozen=True)
class Reserved:
    """A message as it came from its list."""

    source: Source
    #: Empty if the server does not know whether the bytes are a message: then they are still in their list.
    tag: str
    raw: bytes

    @property
    def sha1(self) -> str:
        """The checksum by which the script knows the bytes again."""
        return hashlib.sha1(self.raw, usedforsecurity=False).hexdigest()

    def payload(self) -> dict[str, Any] | None:
        """Parse the bytes; None if they are no message."""
        try:
            payload = _loads(self.raw)
        except Exception:  # kombu's JSON calls constructors, which may raise anything
            return None
        return payload if isinstance(payload, dict) else None

    def complete(self, payload: dict[str, Any]) -> bool:
        """Give a message its tag, and the parts that a foreign client left out. Returns whether parts were missing."""
        lacks = [part for part in ("headers", "properties") if not isinstance(payload.get(part), dict)]
        payload |= {part: {} for part in lacks}
        properties = payload["properties"]
        properties["delivery_tag"] = self.tag
        match properties.get("delivery_info"):
            case {"exchange": str(), "routing_key": str()}:
                return bool(lacks)
        properties["delivery_info"] = {"exchange": "", "routing_key": self.source.queue}
        return True
