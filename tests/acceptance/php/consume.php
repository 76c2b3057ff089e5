<?php

// An app that reads its queue on RabbitMQ with php-amqplib.
//
// In: one JSON argument: host, port, user, password, vhost, queue, count. Out: one line of JSON for each message: its
// properties, its headers, its body as it came, and the body's result (or its data's) with base64 decoded.

use App\Jobs\EmbeddingReady;
use PhpAmqpLib\Wire\AMQPTable;

require __DIR__ . '/amqp.php';
require dirname(__DIR__, 3) . '/examples/laravel/EmbeddingReady.php';

$given = json_decode($argv[1], true);
$connection = amqp_connection($given);
$channel = $connection->channel();
$channel->queue_declare($given['queue'], false, true, false, false);
$left = $given['count'];
$channel->basic_consume($given['queue'], callback: function ($message) use (&$left) {
    $body = json_decode($message->getBody(), true, 512, JSON_THROW_ON_ERROR);
    $properties = $message->get_properties();
    $headers = $properties['application_headers'] ?? new AMQPTable();
    unset($properties['application_headers']);
    echo json_encode([
        'properties' => $properties,
        'headers' => $headers->getNativeData(),
        'body' => $message->getBody(),
        'result' => EmbeddingReady::floats(($body['data'] ?? $body)['result']),
    ], JSON_THROW_ON_ERROR), "\n";
    $message->ack();
    $left--;
});
while ($left > 0) {
    $channel->wait(null, false, 30);
}
$connection->close();
