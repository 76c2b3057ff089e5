"""Tasks as Django's users write them. Only the model's call is legit_worker's."""

from __future__ import annotations

from celery import shared_task

import legit_worker
from shop.models import Product

minilm = legit_worker.model("minilm")


@shared_task
def embed_product(number: int) -> None:
    """Compute and store a product's vector. Other tasks run while the model computes."""
    product = Product.objects.get(pk=number)
    product.vector = minilm.encode(product.name).tolist()
    product.save(update_fields=["vector"])


@shared_task
def embed(text: str) -> list[float]:
    """A text's vector."""
    return minilm.encode(text).tolist()
