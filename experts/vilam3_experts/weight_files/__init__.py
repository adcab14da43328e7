"""Sources of the experts' weights, downloads, the lock file, and a quarantined converter of pickled files."""
