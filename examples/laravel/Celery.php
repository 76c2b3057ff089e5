<?php

namespace App\Services;

use Illuminate\Redis\Connections\Connection;
use Illuminate\Support\Str;
use InvalidArgumentException;
use stdClass;

/**
 * Sends tasks to Celery workers, through Redis. Goes to app/Services.
 *
 * In: a task's name and its arguments. Out: a message of Celery's protocol 2 on the list that the workers read. It has
 * what a worker needs, the app that the result goes to, and nothing else.
 */
class Celery
{
    /** The connection has no prefix: Laravel would put it before this list's name, too, and no worker reads that list. */
    public function __construct(
        protected Connection $redis,
        protected ?string $app = null,
        protected string $queue = 'celery',
    ) {
    }

    /** Returns the task's id, which its result has, too. What is in $meta comes back with the result. */
    public function send(string $task, array $args = [], array $kwargs = [], mixed $meta = null): string
    {
        if ($args !== array_values($args)) {
            throw new InvalidArgumentException('$args is a list: arguments that have names go to $kwargs');
        }
        $id = (string) Str::uuid();
        // An empty array of PHP's would be a list in JSON.
        $body = json_encode([$args, (object) $kwargs, new stdClass()], JSON_THROW_ON_ERROR);
        $this->push($body, ['task' => $task, 'id' => $id] + $this->routing($meta));

        return $id;
    }

    protected function push(string $body, array $headers): void
    {
        $this->redis->lpush($this->queue, json_encode([
            'body' => $body,
            'content-type' => 'application/json',
            'content-encoding' => 'utf-8',
            'headers' => $headers,
            'properties' => [
                'delivery_tag' => $headers['id'],
                'delivery_info' => ['exchange' => '', 'routing_key' => $this->queue],
            ],
        ], JSON_THROW_ON_ERROR));
    }

    /** The headers that tell legit_worker where the result goes, and with what. */
    protected function routing(mixed $meta): array
    {
        return $this->app === null ? [] : ['app' => $this->app, 'meta' => $meta];
    }
}
