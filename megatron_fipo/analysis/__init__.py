"""What responses consist of, and how that changes as a run trains: lengths by part, re-checks, repetition, errors."""
