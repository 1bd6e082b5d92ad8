"""``python -m everstep``: the same as the ``everstep`` command."""

from everstep.cli import main

if __name__ == "__main__":
    main()
