"""Patches of third-party packages while a decoder is traced and lowered for ExecuTorch.

Each file is one patch: a context manager, the releases it was tested with, and in its docstring the
upstream behaviour it works around. ``tests/export/test_executorch_patches.py`` has a test for each
patch that fails once the patch is no longer needed or no longer fits.
"""

from caliport.core.patching import check_tested


def check_releases() -> None:
    """Check the installed releases against the patches that a correct program needs.

    Raises:
        InputError: An installed release was not tested with one of these patches.
    """
    from caliport.export.decoder.patches import own_attention
    from caliport.export.executorch.patches import quantized_lookup, tanh_gelu, weight_keys

    for patch in (own_attention, quantized_lookup, tanh_gelu, weight_keys):
        check_tested(patch.RELEASES)
