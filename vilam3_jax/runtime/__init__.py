"""Code without models: paths, processes, versions, run folders."""
