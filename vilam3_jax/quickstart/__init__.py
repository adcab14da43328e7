"""`make quickstart`: its datasets, made from a folder of samples, and the chain of commands it runs."""
