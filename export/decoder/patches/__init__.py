"""Patches of transformers' modelling code while a decoder is traced for any runtime.

Each file is one patch: a context manager, the releases it was tested with, and in its docstring the
upstream behaviour it works around. ``tests/export/test_decoder_patches.py`` has a test for each
patch that fails once the patch is no longer needed or no longer fits.
"""
