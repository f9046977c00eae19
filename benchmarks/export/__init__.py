"""Our exports of a Llama of the 1B shape beside those of the peers, in one run."""
