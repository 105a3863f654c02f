"""Prompt methods ("hosts"): what is tuned. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from gram_core.prompts.base import PromptMethod
from gram_core.prompts.coop import Coop
from gram_core.prompts.residual import Residual

METHODS: dict[str, type[PromptMethod]] = {"coop": Coop, "residual": Residual}

__all__ = ["METHODS", "Coop", "PromptMethod", "Residual"]
