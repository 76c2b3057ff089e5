"""The script that reserves messages on a Redis server, and the messages that it reserved.

In: the script's answer. Out: messages that kombu can deliver, and bytes that are no message.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

#: The most messages, and bytes, of one reservation. The first reservation after a wait asks for one message, and each
#: full one doubles the next. So if there are few messages, an idle worker beside this one gets its share.
MOST_MESSAGES = 64
MOST_BYTES = 1 << 20

#: Reserves messages. It notes each message among the unacked ones, as kombu's `QoS.append` does (kombu.transport.redis,
#: 5.7), and only then takes it off its list, so an error between the two loses nothing. If a queue's consumer doesn't
#: ack, the script takes its messages and notes nothing, as kombu does.
#:
#: KEYS: the unacked messages, their index, then lists: most urgent priority first, the queues of one priority in a row.
#: ARGV: most messages, most bytes, now (seconds), the start of a new tag, 1 if queues take turns; then for each
#: queue its name, and 1 if its messages are acked.
#: Returns 1 if more may be waiting, else 0; then, for each message, its list's number, its tag, and its bytes.
RESERVE = """
local messages, bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local now, new_tag, turns = ARGV[3], ARGV[4], ARGV[5] == '1'
local queues = (#ARGV - 5) / 2
local reply = {0}

local function address(raw)
    local message = cjson.decode(raw)
    local to = message.properties.delivery_info
    return message.properties.delivery_tag, to.exchange, to.routing_key
end

local function reserve(list, queue)
    local raw = redis.call('LINDEX', KEYS[list], -1)
    if not raw then return false end
    local ok, tag, exchange, routing_key = pcall(address, raw)
    if not ok or type(exchange) ~= 'string' or type(routing_key) ~= 'string' then
        exchange, routing_key = '', ARGV[4 + 2 * queue]
    end
    if not ok or type(tag) ~= 'string' or redis.call('HEXISTS', KEYS[1], tag) == 1 then
        tag = new_tag .. #reply
    end
    if ARGV[5 + 2 * queue] == '1' then
        redis.call('ZADD', KEYS[2], now, tag)
        redis.call('HSET', KEYS[1], tag,
            '[' .. raw .. ', ' .. cjson.encode(exchange) .. ', ' .. cjson.encode(routing_key) .. ']')
    end
    redis.call('RPOP', KEYS[list])
    messages, bytes = messages - 1, bytes - #raw
    reply[#reply + 1] = list - 2
    reply[#reply + 1] = tag
    reply[#reply + 1] = raw
    return true
end

for first = 3, #KEYS, queues do
    local again = true
    while again do
        again = false
        for queue = 1, queues do
            repeat
                if messages <= 0 or bytes <= 0 then
                    reply[1] = 1
                    return reply
                end
                local found = reserve(first + queue - 1, queue)
                again = again or found
            until turns or not found
        end
    end
end
return reply
"""
SHA1 = hashlib.sha1(RESERVE.encode(), usedforsecurity=False).hexdigest()


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
    tag: str
    raw: bytes

    def payload(self) -> dict[str, Any] | None:
        """Parse the bytes; None if they are no message."""
        try:
            payload = loads(bytes_to_str(self.raw))
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
