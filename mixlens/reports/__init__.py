"""Reports: one HTML file about one or several runs."""
