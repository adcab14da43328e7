"""Where the experts' weights come from: sources, downloads, the lock file, and a quarantined converter."""
