"""`python -m cod_lightning`."""

import sys

from cod_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
