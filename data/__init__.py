"""Text in, packed rows out: readers, filters, tokenization to disk, and chat data formatting."""
