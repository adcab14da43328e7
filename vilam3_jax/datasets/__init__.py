"""One builder per dataset: the user's download becomes ArrayRecord Examples."""
