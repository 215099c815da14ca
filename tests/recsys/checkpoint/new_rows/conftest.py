"""The runs of the tests of warm starts."""

from tests.recsys.checkpoint.warm_start.conftest import multimodal, plain

__all__ = ["multimodal", "plain"]
