"""Attention, losses and quantised products: numerical code that depends on the hardware."""
