"""`vilam3 data scan`: triage of an image folder from file headers, before training or annotation."""
