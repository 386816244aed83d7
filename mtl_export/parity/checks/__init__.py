"""What parity asks of an artefact, one check per file."""
