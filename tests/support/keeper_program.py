"""The processes of a keeper whose flushes go to files of tests: ``python -m`` runs this."""

import sys

from everstep.checkpoint.keeper.main import main
from tests.support.keepers import PROGRAM, flush_to_file

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], module=PROGRAM, flush=flush_to_file))
