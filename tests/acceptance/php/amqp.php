<?php

// A connection to RabbitMQ. In: host, port, user, password and vhost, among whatever else a program was given.

use PhpAmqpLib\Connection\AMQPStreamConnection;

require_once 'PhpAmqpLib/autoload.php';

function amqp_connection(array $given): AMQPStreamConnection
{
    return new AMQPStreamConnection($given['host'], $given['port'], $given['user'], $given['password'], $given['vhost']);
}
