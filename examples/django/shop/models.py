"""What is sold."""

from __future__ import annotations

from django.db import models


class Product(models.Model):
    """Its vector comes a little later than its row."""

    name = models.CharField(max_length=200)
    vector = models.JSONField(null=True)
