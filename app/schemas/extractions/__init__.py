"""Registered extraction schemas: one Pydantic class a file. The file's name is the public name."""

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache

from pydantic import BaseModel


@cache
def all_schemas() -> Mapping[str, type[BaseModel]]:
    """Every registered class by its public name: the last model that its file defines."""
    found: dict[str, type[BaseModel]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{info.name}")
        models = [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, BaseModel)
            and value.__module__ == module.__name__
        ]
        if not models:
            raise ValueError(f"app/schemas/extractions/{info.name}.py defines no model.")
        found[info.name] = models[-1]
    return found
