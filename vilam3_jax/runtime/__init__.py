"""What a process needs before any model: paths, processes, versions, run folders."""
