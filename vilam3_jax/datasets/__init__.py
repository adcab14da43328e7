"""One builder per dataset: what the user downloaded becomes ArrayRecord Examples."""
