"""Names of the files of an ExecuTorch artifact that only its runtimes read."""

PROGRAM = "model.pte"
