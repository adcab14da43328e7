"""Attention, losses and activation sharding: the numeric parts that know about hardware."""
