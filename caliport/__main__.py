"""``python -m caliport``."""

from caliport.cli.app import main

main()
