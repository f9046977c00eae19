"""The command line, the recipe and the pipeline that strings the stages."""
