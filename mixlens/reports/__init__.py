"""One HTML file about one run or several."""
