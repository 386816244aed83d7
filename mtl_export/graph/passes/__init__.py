"""The rewrites from the traced graph to a deployable one, one pass per file."""
