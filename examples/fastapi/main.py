"""An HTTP API in front of the worker: `uvicorn main:api`. It awaits results, and blocks for none."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from results import Results, TaskFailedError

#: Where tasks go, and where results come from.
BROKER = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
BACKEND = os.environ.get("CELERY_RESULT_BACKEND", "redis://localhost:6379/0")

#: Seconds that a request waits for its result. The first one takes longest, since the worker loads the model.
PATIENCE = 60

results = Results(BROKER, BACKEND)


@asynccontextmanager
async def listening(_: FastAPI) -> AsyncIterator[None]:
    """Listen for results as long as the API is up."""
    listener = asyncio.create_task(results.listen())
    yield
    listener.cancel()


api = FastAPI(lifespan=listening)


@api.get("/embed")
async def embed(text: str) -> list[float]:
    """A text's vector."""
    return await asyncio.wait_for(results.run("legit_worker.embed_text", text), PATIENCE)


@api.exception_handler(TaskFailedError)
async def failed(_: Request, error: TaskFailedError) -> JSONResponse:
    """Bad input is the client's fault, and all else is the server's."""
    status = 422 if error.type == "InvalidInputError" else 500
    return JSONResponse({"error": error.type, "message": str(error)}, status)


@api.exception_handler(asyncio.TimeoutError)
async def late(_: Request, __: asyncio.TimeoutError) -> JSONResponse:
    """The result has not come in time."""
    return JSONResponse({"error": "TimeoutError", "message": f"no result within {PATIENCE} s"}, 504)
