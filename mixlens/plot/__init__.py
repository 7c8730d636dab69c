"""Figures with matplotlib, and the tables and HTML around them."""
