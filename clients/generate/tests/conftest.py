"""The fixtures of `tiny_models`."""

from tests.integrations.tiny_models import backend, kind, make_model, no_gradients

__all__ = ["backend", "kind", "make_model", "no_gradients"]
