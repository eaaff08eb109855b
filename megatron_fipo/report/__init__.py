"""The report on runs: one page that opens from disk, made of what runs have written into their folders."""
