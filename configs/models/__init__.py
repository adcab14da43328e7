"""Model sizes as data."""
