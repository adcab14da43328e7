"""`python -m vilam3_jax.quickstart`."""

import sys

from vilam3_jax.cli import guarded
from vilam3_jax.quickstart import chain

if __name__ == "__main__":
    sys.exit(guarded("quickstart", chain.main, sys.argv[1:]))
