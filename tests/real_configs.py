"""Until the branches that import it from here are merged."""

from testing.real_configs import *  # noqa: F403
