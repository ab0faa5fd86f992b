"""`python -m jaxvit` is the command `jaxvit`."""

import sys

from jaxvit.cli import main

sys.exit(main())
