"""`python -m quailora` is the command `quailora`."""

from quailora.cli.app import main

main()
