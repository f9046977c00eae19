"""Files of models and tokenizers: checked before a library reads them, and opened with limits."""
