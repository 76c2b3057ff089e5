<?php

// A client that pushes Celery messages to Redis and reads the results from their keys.
//
// In: one JSON argument: broker and backend (host, port, database), queue, how (see celery_message.php, and base64),
// calls. Out: one line of JSON for each call, in order: what lies under its result key, once the task is over.

require __DIR__ . '/celery_message.php';

const OVER = ['SUCCESS', 'FAILURE', 'REVOKED'];
const ANSWER_SECONDS = 30;

function connected(array $server): Redis
{
    $redis = new Redis();
    $redis->connect($server['host'], $server['port']);
    $redis->select($server['database']);
    return $redis;
}

function envelope(array $call, array $how, string $queue): array
{
    $body = celery_body($call, $how);
    $needed = [
        'delivery_tag' => bin2hex(random_bytes(16)),
        'delivery_info' => ['exchange' => '', 'routing_key' => $queue],
    ];
    $optional = ['correlation_id' => $call['id'], 'reply_to' => '', 'delivery_mode' => 2, 'priority' => 0];
    return [
        'body' => $how['base64'] ? base64_encode($body) : $body,
        'content-type' => 'application/json',
        'headers' => ($how['list for headers'] ?? false) ? [] : (object) celery_headers($call, $how),
        'properties' => $needed
            + ($how['base64'] ? ['body_encoding' => 'base64'] : [])
            + ($how['optional'] ? $optional : []),
    ] + ($how['optional'] ? ['content-encoding' => 'utf-8'] : []);
}

function result(Redis $redis, string $id): array
{
    $deadline = microtime(true) + ANSWER_SECONDS;
    while (microtime(true) < $deadline) {
        $meta = json_decode($redis->get("celery-task-meta-$id") ?: 'null', true);
        if ($meta && in_array($meta['status'], OVER)) {
            return $meta;
        }
        usleep(20000);
    }
    exit("no result of $id within " . ANSWER_SECONDS . " s\n");
}

$given = json_decode($argv[1], true);
$broker = connected($given['broker']);
foreach ($given['calls'] as $call) {
    $message = json_encode(envelope($call, $given['how'], $given['queue']), JSON_THROW_ON_ERROR);
    $broker->lPush($given['queue'], $message);
}
$backend = connected($given['backend']);
foreach ($given['calls'] as $call) {
    echo json_encode(result($backend, $call['id']), JSON_THROW_ON_ERROR), "\n";
}
