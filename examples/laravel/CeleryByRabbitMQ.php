<?php

namespace App\Services;

use PhpAmqpLib\Channel\AMQPChannel;
use PhpAmqpLib\Message\AMQPMessage;
use PhpAmqpLib\Wire\AMQPTable;

/** The same through RabbitMQ, with php-amqplib. Goes to app/Services, beside Celery.php. */
class CeleryByRabbitMQ extends Celery
{
    public function __construct(
        protected AMQPChannel $channel,
        protected ?string $app = null,
        protected string $queue = 'celery',
    ) {
        // RabbitMQ drops a message for a queue that is not there. Celery's workers declare theirs in the same way.
        $channel->queue_declare($queue, durable: true, auto_delete: false);
        $channel->confirm_select();
    }

    protected function push(string $body, array $headers): void
    {
        $message = new AMQPMessage($body, [
            'content_type' => 'application/json',
            'content_encoding' => 'utf-8',
            'delivery_mode' => AMQPMessage::DELIVERY_MODE_PERSISTENT,
            'application_headers' => new AMQPTable($headers),
        ]);
        $this->channel->basic_publish($message, routing_key: $this->queue);
        $this->channel->wait_for_pending_acks(5);
    }
}
