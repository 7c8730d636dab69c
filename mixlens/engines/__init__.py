"""Routing from elsewhere: engines, servers and files, checked before it is believed."""
