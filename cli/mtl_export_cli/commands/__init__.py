"""One command per file, no arithmetic."""
