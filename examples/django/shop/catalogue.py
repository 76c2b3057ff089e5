"""What views would call: they send tasks, and load no model."""

from __future__ import annotations

import numpy as np
from django.db import transaction

from shop.models import Product
from shop.tasks import embed, embed_product

#: Seconds to wait for a vector. The first one takes longest, since the worker loads the model.
PATIENCE = 60


@transaction.atomic
def add(*names: str) -> None:
    """Add products. Their tasks are sent once the transaction is committed: then the worker finds the rows."""
    for name in names:
        product = Product.objects.create(name=name)
        embed_product.delay_on_commit(product.pk)


def find(text: str) -> list[str]:
    """The names of all products that have a vector, the closest to this text first."""
    query = np.array(embed.delay(text).get(timeout=PATIENCE))
    products = list(Product.objects.filter(vector__isnull=False))
    # The vectors have length 1, so a product of two is their cosine.
    return [product.name for product in sorted(products, key=lambda one: -(query @ one.vector))]
