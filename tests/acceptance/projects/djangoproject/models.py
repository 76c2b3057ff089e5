"""What the tasks write."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Row(models.Model):
    """One of several that a task writes."""

    item: ClassVar = models.CharField(max_length=100)
    step: ClassVar = models.CharField(max_length=100)
