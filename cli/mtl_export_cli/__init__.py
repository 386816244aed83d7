"""The command line ``mtl-export``."""
