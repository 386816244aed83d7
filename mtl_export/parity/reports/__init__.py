"""A ``ParityReport`` in the formats that people and CI systems read, one file each."""
