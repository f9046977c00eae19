"""``python -m caliport``."""

from caliport.cli import main

main()
