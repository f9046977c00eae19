"""What `caliport run` does with a recipe, stage by stage."""
