<?php

// A Laravel app that sends tasks through RabbitMQ by the example's class, without the rest of Laravel.
//
// In: one JSON argument: host, port, user, password, vhost, queue, app and calls, each with task, args, kwargs, meta. Out:
// one line of JSON for each call, in order: the task's id.

use App\Services\CeleryByRabbitMQ;

require_once 'Illuminate/Support/autoload.php';
require __DIR__ . '/amqp.php';
$examples = dirname(__DIR__, 3) . '/examples/laravel';
require "$examples/Celery.php";
require "$examples/CeleryByRabbitMQ.php";

$given = json_decode($argv[1], true);
$connection = amqp_connection($given);
$celery = new CeleryByRabbitMQ($connection->channel(), app: $given['app'], queue: $given['queue']);
foreach ($given['calls'] as $call) {
    $id = $celery->send($call['task'], $call['args'], kwargs: $call['kwargs'], meta: $call['meta']);
    echo json_encode(['id' => $id], JSON_THROW_ON_ERROR), "\n";
}
$connection->close();
