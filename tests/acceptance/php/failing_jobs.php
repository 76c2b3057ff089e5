<?php

// The example's job with a fault after it has written its row: what Laravel does with a job that throws.

namespace App\Jobs;

use RuntimeException;

class FailsOnce extends EmbeddingReady
{
    private int $attempts = 0;

    public function handle($job, array $envelope): void
    {
        $this->attempts = $job->attempts();
        parent::handle($job, $envelope);
    }

    protected function store(array $envelope, array $columns): void
    {
        parent::store($envelope, $columns);
        if ($this->attempts < 2) {
            throw new RuntimeException('the first try fails');
        }
    }
}

class AlwaysFails extends EmbeddingReady
{
    protected function store(array $envelope, array $columns): void
    {
        throw new RuntimeException('every try fails');
    }
}
