"""`python -m proxyd` is the same program as the console script `proxyd`."""

import sys

from proxyd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
