<?php

// `php artisan queue:work redis --stop-when-empty` without the rest of Laravel: its own worker, queue, events and jobs.
//
// In: one JSON argument: host, port, database, prefix, queue, sqlite, and optionally tries, block_for and jobs.
// Out: one line of JSON for each of Laravel's queue events; the rows that the jobs wrote, in the SQLite file.

use Illuminate\Container\Container;
use Illuminate\Contracts\Debug\ExceptionHandler;
use Illuminate\Database\Capsule\Manager as Database;
use Illuminate\Database\ConnectionInterface;
use Illuminate\Events\Dispatcher;
use Illuminate\Queue\Connectors\RedisConnector;
use Illuminate\Queue\Events\JobExceptionOccurred;
use Illuminate\Queue\Events\JobFailed;
use Illuminate\Queue\Events\JobProcessed;
use Illuminate\Queue\Events\JobProcessing;
use Illuminate\Queue\QueueManager;
use Illuminate\Queue\Worker;
use Illuminate\Queue\WorkerOptions;
use Illuminate\Redis\RedisManager;
use Illuminate\Support\Facades\Facade;
use Illuminate\Support\Facades\Schema;

foreach (['Queue', 'Redis', 'Events', 'Database'] as $part) {
    require_once "Illuminate/$part/autoload.php";
}
$examples = dirname(__DIR__, 3) . '/examples/laravel';
require "$examples/EmbeddingReady.php";
require __DIR__ . '/failing_jobs.php';

$given = json_decode($argv[1], true) + ['tries' => 1, 'block_for' => null, 'jobs' => 0];

$app = new Container();
Container::setInstance($app);
Facade::setFacadeApplication($app);

$database = new Database($app);
$database->addConnection(['driver' => 'sqlite', 'database' => $given['sqlite']]);
$app->instance('db', $database->getDatabaseManager());
$app->instance(ConnectionInterface::class, $database->getConnection());
if (! Schema::hasTable('embedding_results')) {
    (require "$examples/create_embedding_results_table.php")->up();
}

$events = new Dispatcher($app);
$app->instance('events', $events);
$app->instance(Illuminate\Contracts\Events\Dispatcher::class, $events);
foreach ([JobProcessing::class, JobProcessed::class, JobExceptionOccurred::class, JobFailed::class] as $class) {
    $events->listen($class, function ($event) {
        echo json_encode([
            'event' => class_basename($event),
            'name' => $event->job->getName(),
            'display_name' => $event->job->resolveName(),
            'payload' => $event->job->payload(),
            'uuid' => $event->job->uuid(),
            'job_id' => $event->job->getJobId(),
            'attempts' => $event->job->attempts(),
            'error' => isset($event->exception) ? $event->exception->getMessage() : null,
        ], JSON_THROW_ON_ERROR), "\n";
    });
}

$redis = new RedisManager($app, 'phpredis', [
    'options' => ['prefix' => $given['prefix']],
    'default' => ['host' => $given['host'], 'port' => $given['port'], 'database' => $given['database']],
]);
$app['config']['queue.default'] = 'redis';
$app['config']['queue.connections.redis'] = [
    'driver' => 'redis',
    'connection' => 'default',
    'queue' => 'default',
    'retry_after' => 90,
    'block_for' => $given['block_for'],
];
$manager = new QueueManager($app);
$manager->addConnector('redis', fn () => new RedisConnector($redis));

$handler = new class implements ExceptionHandler {
    public function report(Throwable $e)
    {
        fwrite(STDERR, "$e\n");
    }

    public function shouldReport(Throwable $e)
    {
        return true;
    }

    public function render($request, Throwable $e)
    {
    }

    public function renderForConsole($output, Throwable $e)
    {
    }
};

$options = new WorkerOptions(sleep: 0, maxTries: $given['tries'], stopWhenEmpty: true, maxJobs: $given['jobs']);
exit((new Worker($manager, $events, $handler, fn () => false))->daemon('redis', $given['queue'], $options));
