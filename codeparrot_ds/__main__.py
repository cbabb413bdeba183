"""``python -m codeparrot_ds`` is ``codeparrot-ds``."""

import sys

from codeparrot_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
