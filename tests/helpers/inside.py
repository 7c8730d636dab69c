"""The private parts of mixlens that tests reach, imported in one place."""
