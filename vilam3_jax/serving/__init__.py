"""`vilam3 serve`: an HTTP server and its page."""
