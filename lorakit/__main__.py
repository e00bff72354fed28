"""`python -m lorakit`."""

from lorakit.cli.app import main

main()
