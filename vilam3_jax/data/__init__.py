"""Examples, annotations, templates, packing and the loader."""
