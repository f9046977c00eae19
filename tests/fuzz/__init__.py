"""Thousands of seeded bad inputs to every command, each judged by what is promised of bad input.

``make test`` tries a hundred with a fixed seed, ``make fuzz`` thousands. A case is named by its
kind and a number, which give the same bad input again: ``python -m tests.fuzz adapter:17``.

- ``seeds``: tiny valid inputs, which every case starts from
- ``mutate``: ways to spoil a JSON tree, bytes, tensors, a file
- ``cases``, ``flags``: by kind, what is spoiled and which command reads it
- ``table``: small examples of what once ended badly
- ``judge``: runs a command within limits and says whether it ended as promised
"""
