"""`python -m vilam3_experts`, the same as `vilam3-experts`."""

import sys

from vilam3_experts.cli import main

sys.exit(main())
