<?php

// Celery's messages, protocols 2 and 1, as a Laravel package writes them.
//
// `$how`: protocol; optional: with all that Celery itself sends, or only what it needs; escaped: JSON in ASCII.

function celery_body(array $call, array $how): string
{
    $kwargs = (object) $call['kwargs']; // an empty array would be a list in JSON
    $none = ['callbacks' => null, 'errbacks' => null, 'chain' => null, 'chord' => null];
    $body = match ($how['protocol']) {
        2 => [$call['args'], $kwargs, $how['optional'] ? $none : new stdClass()],
        1 => ['id' => $call['id'], 'task' => $call['task'], 'args' => $call['args'], 'kwargs' => $kwargs]
            + ($how['optional'] ? celery_optional_v1() : []),
    };
    return json_encode($body, JSON_THROW_ON_ERROR | ($how['escaped'] ? 0 : JSON_UNESCAPED_UNICODE));
}

function celery_optional_v1(): array
{
    return [
        'eta' => null, 'expires' => null, 'retries' => 0, 'utc' => true, 'timelimit' => [null, null],
        'callbacks' => null, 'errbacks' => null, 'taskset' => null, 'chord' => null,
    ];
}

function celery_headers(array $call, array $how): array
{
    if ($how['protocol'] === 1) {
        return [];
    }
    $needed = ['task' => $call['task'], 'id' => $call['id']];
    return ! $how['optional'] ? $needed : $needed + [
        'lang' => 'php', 'shadow' => null, 'eta' => null, 'expires' => null, 'group' => null, 'group_index' => null,
        'retries' => 0, 'timelimit' => [null, null], 'root_id' => $call['id'], 'parent_id' => null,
        'argsrepr' => '(…)', 'kwargsrepr' => '{…}', 'origin' => 'laravel@web-1', 'ignore_result' => false,
    ];
}
