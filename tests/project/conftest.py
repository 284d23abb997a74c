"""Every test of the project runs on one thread."""

from one_thread import one_thread  # noqa: F401  a fixture
