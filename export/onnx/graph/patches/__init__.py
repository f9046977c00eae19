"""Patches of third-party packages while a decoder is traced for ONNX.

Each file is one patch: a context manager, the releases it was tested with, and in its docstring the
upstream behaviour it works around. ``tests/export/test_onnx_patches.py`` has a test for each patch
that fails once the patch is no longer needed or no longer fits.
"""

from caliport.core.patching import check_tested


def check_releases() -> None:
    """Check the installed releases against the patches that a correct graph needs.

    Raises:
        InputError: An installed release was not tested with one of these patches.
    """
    from caliport.export.decoder.patches import own_attention
    from caliport.export.onnx.graph.patches import layers_as_operators

    for patch in (own_attention, layers_as_operators):
        check_tested(patch.RELEASES)
