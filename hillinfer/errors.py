"""The two errors that users meet. Both are one line and name the place or the fix."""


class UsageError(ValueError):
    """A setting, model, path or device that cannot work. Raised before any work starts; names the fix."""


class DriveError(OSError):
    """The drive failed in mid-run: full, gone, short, stuck or damaged. Names the layer and the position."""
