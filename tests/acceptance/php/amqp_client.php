<?php

// A client that publishes Celery messages to RabbitMQ and reads the results from a reply queue of its own.
//
// In: one JSON argument: host, port, user, password, vhost, queue, how (see celery_message.php), calls. Out: one line of
// JSON for each call, in order: the last reply that has its correlation id.

use PhpAmqpLib\Message\AMQPMessage;
use PhpAmqpLib\Wire\AMQPTable;

require __DIR__ . '/amqp.php';
require __DIR__ . '/celery_message.php';

const OVER = ['SUCCESS', 'FAILURE', 'REVOKED'];
const ANSWER_SECONDS = 30;

$given = json_decode($argv[1], true);
$connection = amqp_connection($given);
$channel = $connection->channel();
[$replies] = $channel->queue_declare('', false, false, true, true);
foreach ($given['calls'] as $call) {
    $properties = ['content_type' => 'application/json', 'content_encoding' => 'utf-8'];
    $properties += ['correlation_id' => $call['id'], 'reply_to' => $replies];
    $properties += $given['how']['optional'] ? ['delivery_mode' => 2, 'priority' => 0] : [];
    $headers = celery_headers($call, $given['how']);
    $properties += $headers ? ['application_headers' => new AMQPTable($headers)] : [];
    $channel->basic_publish(new AMQPMessage(celery_body($call, $given['how']), $properties), '', $given['queue']);
}
$found = [];
$channel->basic_consume($replies, no_ack: true, callback: function ($message) use (&$found) {
    $meta = json_decode($message->getBody(), true, 512, JSON_THROW_ON_ERROR);
    if (in_array($meta['status'], OVER)) {
        $found[$message->get('correlation_id')] = $meta;
    }
});
while (count($found) < count($given['calls'])) {
    $channel->wait(null, false, ANSWER_SECONDS);
}
foreach ($given['calls'] as $call) {
    echo json_encode($found[$call['id']], JSON_THROW_ON_ERROR), "\n";
}
$connection->close();
