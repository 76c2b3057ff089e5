<?php

// A Laravel app that sends tasks by the example's class, without the rest of Laravel.
//
// In: one JSON argument: host, port, database, prefix (the app's own), queue, app and calls, each with task, args, kwargs,
// meta. Out: one line of JSON for each call, in order: the task's id.

use App\Services\Celery;
use Illuminate\Container\Container;
use Illuminate\Redis\RedisManager;

foreach (['Container', 'Redis', 'Support'] as $part) {
    require_once "Illuminate/$part/autoload.php";
}
require dirname(__DIR__, 3) . '/examples/laravel/Celery.php';

$given = json_decode($argv[1], true);
$server = ['host' => $given['host'], 'port' => $given['port'], 'database' => $given['database']];
$redis = new RedisManager(new Container(), 'phpredis', [
    'options' => ['prefix' => $given['prefix']],
    'default' => $server,
    'celery' => $server + ['options' => ['prefix' => '']],
]);
$celery = new Celery($redis->connection('celery'), app: $given['app'], queue: $given['queue']);
foreach ($given['calls'] as $call) {
    $id = $celery->send($call['task'], $call['args'], kwargs: $call['kwargs'], meta: $call['meta']);
    echo json_encode(['id' => $id], JSON_THROW_ON_ERROR), "\n";
}
