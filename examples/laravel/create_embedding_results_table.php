<?php

use Illuminate\Database\Migrations\Migration;
use Illuminate\Database\Schema\Blueprint;
use Illuminate\Support\Facades\Schema;

return new class extends Migration
{
    public function up(): void
    {
        Schema::create('embedding_results', function (Blueprint $table) {
            $table->id();
            $table->string('task_id');
            $table->unsignedInteger('attempt');
            $table->string('status');
            $table->json('result')->nullable();
            $table->json('error')->nullable();
            $table->json('meta')->nullable();
            $table->unique(['task_id', 'attempt']);
        });
    }

    public function down(): void
    {
        Schema::dropIfExists('embedding_results');
    }
};
