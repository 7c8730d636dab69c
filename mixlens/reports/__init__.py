"""Reports: one HTML file on one run or several."""
