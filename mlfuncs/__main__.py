"""`python -m mlfuncs`: the same as the command `mlfuncs`."""

from mlfuncs.cli import main

if __name__ == "__main__":
    main()
