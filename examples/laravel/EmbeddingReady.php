<?php

namespace App\Jobs;

use Illuminate\Contracts\Queue\Job;
use Illuminate\Database\ConnectionInterface;
use Throwable;
use UnexpectedValueException;

/**
 * What `php artisan queue:work` calls for each result that legit_worker sends. Goes to app/Jobs.
 *
 * In: an envelope, see docs/envelope.schema.json. Out: one row per envelope, however often it comes.
 */
class EmbeddingReady
{
    /** The version of the envelope that this class reads. Fields may be added to it; nothing else changes. */
    protected const VERSION = 1;

    public function __construct(protected ConnectionInterface $database)
    {
    }

    public function handle(Job $job, array $envelope): void
    {
        if ($envelope['v'] !== self::VERSION) {
            // Another try would end the same way. In failed_jobs it waits for a class that reads it: queue:retry.
            $job->fail(new UnexpectedValueException("envelope version {$envelope['v']}, known is " . self::VERSION));

            return;
        }

        // One transaction: when a line below throws, the row is gone too, and Laravel's next try is no duplicate.
        $this->database->transaction(function () use ($envelope) {
            if ($this->isNew($envelope)) {
                match ($envelope['status']) {
                    'SUCCESS' => $this->store($envelope, ['result' => json_encode(self::floats($envelope['result']))]),
                    'FAILURE', 'REVOKED' => $this->store($envelope, ['error' => json_encode($envelope['error'])]),
                };
            }
        });

        // Laravel deletes its own job classes itself; one that is named by a string does it here.
        $job->delete();
    }

    /** Laravel has given up: every try of handle() threw. The envelope is in failed_jobs, too. */
    public function failed(array $envelope, Throwable $error, string $uuid): void
    {
        error_log("result of {$envelope['task']} {$envelope['id']} ($uuid) is not stored: {$error->getMessage()}");
    }

    /** Delivery is at least once. The unique index over id and attempt tells a duplicate. */
    protected function isNew(array $envelope): bool
    {
        return $this->database->table('embedding_results')->insertOrIgnore([
            'task_id' => $envelope['id'],
            'attempt' => $envelope['attempt'],
            'status' => $envelope['status'],
            'meta' => json_encode($envelope['meta']),
        ]) === 1;
    }

    protected function store(array $envelope, array $columns): void
    {
        $this->database->table('embedding_results')
            ->where(['task_id' => $envelope['id'], 'attempt' => $envelope['attempt']])
            ->update($columns);
    }

    /** A result with each array of ENCODING=base64 as nested lists of numbers, and all else as it is. */
    public static function floats(mixed $value): mixed
    {
        if (! is_array($value)) {
            return $value;
        }
        if (! isset($value['base64'], $value['shape'])) {
            return array_map([self::class, 'floats'], $value);
        }
        $numbers = array_values(unpack('g*', base64_decode($value['base64'])));
        foreach (array_reverse(array_slice($value['shape'], 1)) as $length) {
            $numbers = array_chunk($numbers, $length);
        }

        return $numbers;
    }
}
