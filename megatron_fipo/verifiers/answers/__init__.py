"""Final answers of mathematics: parsed, compared by the rules of docs/verifiers.md, and written canonically."""
