"""``python -m amvl_fast``, the form that torchrun and accelerate start."""

import sys

from amvl_fast.cli import main

sys.exit(main())
