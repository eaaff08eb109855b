"""In place of uvicorn, into which the launcher puts the guard of real servers; the fake server asks it by itself."""


class Config:
    """What the launcher changes of it."""

    def load(self) -> None:
        """Make ready to serve."""
