"""Mesh construction, logical axes, rules over parameter paths, and the products that follow them."""
