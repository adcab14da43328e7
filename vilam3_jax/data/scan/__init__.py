"""`vilam3 data scan`: triage of a folder before anything is trained or annotated."""
