"""From files of rows to tokenized examples."""
