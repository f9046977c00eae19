"""Commands that take flags in place of a recipe; the same code runs behind both."""
