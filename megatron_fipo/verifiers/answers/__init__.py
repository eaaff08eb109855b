"""Final answers of mathematics: read into what they say, compared by docs/verifiers.md's rules, written canonically."""
