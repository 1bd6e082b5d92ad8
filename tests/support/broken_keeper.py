"""A supervisor whose keepers end as soon as they are started."""

import sys

from everstep.checkpoint.keeper.main import main

if __name__ == "__main__":
    if "--role=keeper" in sys.argv:
        sys.exit("there is no such program as a keeper here")
    sys.exit(main(sys.argv[1:], module="tests.support.broken_keeper"))
