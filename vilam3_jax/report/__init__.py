"""The report of a run: charts and tables as one HTML file, figures as `summary.json`."""
