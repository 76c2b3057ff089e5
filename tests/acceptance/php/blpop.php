<?php

// An app that reads format `json` with BLPOP and nothing else.
//
// In: one JSON argument: host, port, database, key, count. Out: one line of JSON for each envelope: what came, and its
// result with base64 decoded.

use App\Jobs\EmbeddingReady;

require dirname(__DIR__, 3) . '/examples/laravel/EmbeddingReady.php';

$given = json_decode($argv[1], true);
$redis = new Redis();
$redis->connect($given['host'], $given['port']);
$redis->select($given['database']);
for ($number = 0; $number < $given['count']; $number++) {
    $popped = $redis->blPop([$given['key']], 30) or exit("nothing came within 30 s\n");
    $envelope = json_decode($popped[1], true, 512, JSON_THROW_ON_ERROR);
    $result = EmbeddingReady::floats($envelope['result']);
    echo json_encode(['envelope' => json_decode($popped[1]), 'result' => $result], JSON_THROW_ON_ERROR), "\n";
}
