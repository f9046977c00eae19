"""What runs models and artifacts: one protocol for all of them, and one engine a runtime."""
