"""``python -m caliport``."""

from caliport.cli.main import main

main()
