"""Import of existing masks as annotations."""
