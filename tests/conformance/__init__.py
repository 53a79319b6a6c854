"""What a client of unslothd has to do, in any language: cases as data, a runner, an adapter for each language."""
