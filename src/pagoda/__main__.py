"""`python -m pagoda`: the command line, as `pagoda` itself."""

import sys

from pagoda.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
