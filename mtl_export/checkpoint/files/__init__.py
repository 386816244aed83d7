"""The one reader of each kind of file."""
