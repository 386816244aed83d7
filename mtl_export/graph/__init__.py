"""One trace lowered to many graphs: ``AdapterSet`` into ``ir.Model``."""
